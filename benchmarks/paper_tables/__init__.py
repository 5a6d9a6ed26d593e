"""The experiments of Deiseroth et al. 2023 on SmolLM2, with what FDT is compared with: docs/results.md."""
