import pytest

from dtm_fast import GPTQ, W8A8, Drop, Int4, Int8, LLMInt8, Prune, SparseGPT, parse_treatment
from dtm_fast.errors import InputError, TreatmentError

SPELLED = {
    "int8": Int8(),
    "w8a8": W8A8(),
    "llm_int8": LLMInt8(),
    "llm_int8(5.0)": LLMInt8(5),
    "int4(128)": Int4(),
    "int4(64)": Int4(64),
    "int4(row)": Int4(None),
    "gptq(128)": GPTQ(),
    "gptq(64)": GPTQ(64),
    "gptq(row)": GPTQ(None),
    "gptq(128,damp=0.1)": GPTQ(damp=0.1),
    "prune(0.5)": Prune(0.5),
    "prune(0.0)": Prune(0),
    "prune(1.0)": Prune(1),
    "prune(0.001)": Prune(1e-3),
    "prune(0.5,row)": Prune(0.5, group="row"),
    "prune(2:4)": Prune("2:4"),
    "prune(0.5,wanda)": Prune(0.5, "wanda"),
    "prune(0.5,wanda,matrix)": Prune(0.5, "wanda", "matrix"),
    "prune(2:4,wanda)": Prune("2:4", "wanda"),
    "sparsegpt(0.5)": SparseGPT(0.5),
    "sparsegpt(1.0)": SparseGPT(1),
    "sparsegpt(2:4)": SparseGPT("2:4"),
    "sparsegpt(0.5,damp=0.1)": SparseGPT(0.5, damp=0.1),
    "sparsegpt(0.5,block=64)": SparseGPT(0.5, block=64),
    "sparsegpt(0.5,damp=1.0,block=64)": SparseGPT(0.5, 1, 64),
    "drop": Drop(),
}


@pytest.mark.parametrize("key", SPELLED)
def test_a_key_spells_its_treatment(key):
    assert SPELLED[key].key == key
    assert parse_treatment(key) == SPELLED[key]
    assert hash(parse_treatment(key)) == hash(SPELLED[key])


def test_unequal_treatments_have_unequal_keys():
    assert len(set(SPELLED.values())) == len({each.key for each in SPELLED.values()}) == len(SPELLED)


@pytest.mark.parametrize(
    ("text", "treatment"),
    [
        (" int8 ", Int8()),
        ("INT8", Int8()),
        ("int8()", Int8()),
        ("Prune( 0.5 )", Prune(0.5)),
        ("prune(.5)", Prune(0.5)),
        ("prune(0.5, magnitude)", Prune(0.5)),
        ("prune(0.5,matrix)", Prune(0.5)),
        ("prune(0.5,magnitude,row)", Prune(0.5, group="row")),
        ("prune(0.5,wanda,row)", Prune(0.5, "wanda")),
        ("prune( 2:4 , wanda )", Prune("2:4", "wanda")),
        ("int4", Int4(128)),
        ("gptq", GPTQ(128)),
        ("gptq(128, 0.1)", GPTQ(damp=0.1)),
        ("gptq(damp=0.1)", GPTQ(damp=0.1)),
        ("llm_int8(6)", LLMInt8()),
        ("sparsegpt(.5, damp=0.01, block=128)", SparseGPT(0.5)),
        ("drop()", Drop()),
    ],
)
def test_other_spellings_are_read_too(text, treatment):
    assert parse_treatment(text) == treatment


@pytest.mark.parametrize("text", ["", "int9", "prune 0.5", "prune(0.5", "(0.5)", "int8;drop", "prüne(1)"])
def test_an_unknown_treatment_is_answered_with_the_known(text):
    known = "int8, w8a8, llm_int8, int4, gptq, prune, sparsegpt, drop"
    with pytest.raises(TreatmentError, match=rf"no treatment .*known: {known}"):
        parse_treatment(text)


@pytest.mark.parametrize(
    "text",
    [
        "prune",
        "prune()",
        "prune(half)",
        "int8(3)",
        "prune(0.5,magnitude,row,1)",
        "prune(0.5,seed=1)",
        "int4(64,64)",
        "int4(6.5)",
        "gptq(64,damp=much)",
        "gptq(64,0.1,damp=0.1)",
        "sparsegpt()",
        "sparsegpt(0.5,damp=)",
        "llm_int8(big)",
        "drop(1)",
    ],
)
def test_wrong_arguments_are_named(text):
    with pytest.raises(TreatmentError, match="wrong arguments for"):
        parse_treatment(text)


NUMBERS = "must be a finite number of at least 0"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prune(1.5)", "Prune: sparsity must lie in [0, 1], not 1.5"),
        ("prune(4:2)", "Prune: 4:2 drops nothing: N of N:M must be less than M"),
        ("prune(4:4)", "Prune: 4:4 drops nothing: N of N:M must be less than M"),
        ("prune(0:4)", "Prune: sparsity must be a number or a pattern like '2:4', not '0:4'"),
        ("prune(2:4:8)", "Prune: sparsity must be a number or a pattern like '2:4', not '2:4:8'"),
        ("prune(2 :4)", "Prune: sparsity must be a number or a pattern like '2:4', not '2 :4'"),
        ("prune(2:4,row)", "Prune: the pattern 2:4 takes no group, not even row"),
        ("prune(0.5,row,wanda)", "Prune: saliency 'row' is none of magnitude, wanda"),
        ("prune(0.5,magnitude,1)", "Prune: group '1' is none of matrix, row"),
        ("prune(0.5,taylor)", "Prune: saliency 'taylor' is none of magnitude, wanda"),
        ("sparsegpt(-1)", "SparseGPT: sparsity must lie in [0, 1], not -1.0"),
        ("sparsegpt(0.5,damp=-1)", f"SparseGPT: damp {NUMBERS}, not -1.0"),
        ("sparsegpt(0.5,block=0)", "SparseGPT: block must be a whole number of at least 1, not 0"),
        ("sparsegpt(2:4,block=64)", "SparseGPT: a block has no effect on the pattern 2:4"),
        ("gptq(0)", "GPTQ: group must be a whole number of at least 1, or None for the row, not 0"),
        ("int4(-8)", "Int4: group must be a whole number of at least 1, or None for the row, not -8"),
        ("gptq(64,damp=nan)", f"GPTQ: damp {NUMBERS}, not nan"),
        ("gptq(64,damp=inf)", f"GPTQ: damp {NUMBERS}, not inf"),
        ("llm_int8(0)", "LLMInt8: threshold must be finite and above 0, not 0.0"),
        ("llm_int8(inf)", "LLMInt8: threshold must be finite and above 0, not inf"),
        ("llm_int8(nan)", "LLMInt8: threshold must be finite and above 0, not nan"),
    ],
)
def test_a_bad_argument_is_said_in_one_line(text, said):
    with pytest.raises(TreatmentError) as error:
        parse_treatment(text)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Prune("0.5"), "Prune: sparsity must be a number or a pattern like '2:4', not '0.5'"),
        (lambda: Prune(None), "Prune: sparsity must be a number or a pattern like '2:4', not None"),
        (lambda: Prune(True), "Prune: sparsity must be a number or a pattern like '2:4', not True"),
        (lambda: Prune(float("nan")), "Prune: sparsity must lie in [0, 1], not nan"),
        (lambda: Prune(0.5, group="layer"), "Prune: group 'layer' is none of matrix, row"),
        (lambda: SparseGPT(None), "SparseGPT: sparsity must be a number or a pattern like '2:4', not None"),
        (lambda: SparseGPT(0.5, block=1.5), "SparseGPT: block must be a whole number of at least 1, not 1.5"),
        (lambda: SparseGPT(0.5, damp="a"), f"SparseGPT: damp {NUMBERS}, not 'a'"),
        (
            lambda: Int4(True),
            "Int4: group must be a whole number of at least 1, or None for the row, not True",
        ),
        (lambda: GPTQ(64, damp=True), f"GPTQ: damp {NUMBERS}, not True"),
        (lambda: LLMInt8("6"), "LLMInt8: threshold must be a number, not '6'"),
        (lambda: LLMInt8(True), "LLMInt8: threshold must be a number, not True"),
    ],
)
def test_a_treatment_that_is_made_wrongly_says_so_in_one_line(make, said):
    with pytest.raises(TreatmentError) as error:
        make()
    assert str(error.value) == said


def test_the_exception_is_a_value_error():
    assert issubclass(TreatmentError, InputError)
    assert issubclass(InputError, ValueError)
