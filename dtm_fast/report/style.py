"""The page's style sheet: light, no fonts or pictures from elsewhere, from 390 px up."""

from dtm_fast.report.layout import ABSENT, FONT, INK

STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #f4f6f8; color: {INK}; font: 16px/1.55 {FONT}; }}
main {{ max-width: 1180px; margin: 0 auto; padding: 28px 24px 48px; }}
header p {{ margin: 0; color: #52606d; }}
h1 {{ margin: 2px 0 14px; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; }}
h2 {{ margin: 0 0 6px; font-size: 1.15rem; }}
section {{ background: #fff; border: 1px solid #e3e7ec; border-radius: 10px; }}
section {{ padding: 20px 22px; margin-top: 18px; }}
sub {{ line-height: 0; }}
code {{ font: 0.92em ui-monospace, 'Liberation Mono', monospace; overflow-wrap: anywhere; }}
.headline {{ font-size: 1.2rem; line-height: 1.45; margin: 0 0 6px; max-width: 60em; overflow-wrap: anywhere; }}
.tiles {{ display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }}
.tiles {{ margin: 16px 0 0; }}
.tiles div {{ background: #f4f6f8; border-radius: 8px; padding: 10px 14px; }}
.tiles dt, .note {{ color: #52606d; font-size: 0.9rem; }}
.tiles dd {{ margin: 0; font-size: 1.35rem; font-weight: 600; line-height: 1.3; }}
.tiles dd small {{ display: block; font-size: 0.85rem; font-weight: 400; color: #52606d; }}
.note {{ margin: 0 0 8px; max-width: 75em; }}
.floor {{ margin: 16px 0 0; }}
figure {{ margin: 0; }}
figcaption {{ font-weight: 600; font-size: 0.95rem; }}
figcaption .note {{ display: block; font-weight: 400; margin: 0; }}
.scroll {{ overflow-x: auto; }}
.curves {{ display: grid; gap: 14px 20px; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); }}
.curves {{ margin-top: 12px; }}
.curves figure {{ min-width: 0; }}
.swatch {{ display: inline-block; width: 0.9em; height: 0.9em; vertical-align: -0.1em; }}
.swatch {{ border: 1px solid #9aa5b1; print-color-adjust: exact; }}
.keys {{ margin: 0 0 4px; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 0.9rem; }}
.keys .swatch {{ width: 1.5em; height: 1.5em; line-height: 1.4em; text-align: center; vertical-align: middle; }}
.absent {{ background: {ABSENT}; }}
details {{ margin-top: 10px; }}
summary {{ cursor: pointer; color: #0b5394; padding: 4px 0; }}
table {{ border-collapse: collapse; min-width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 4px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid #edf0f3; }}
thead th {{ border-bottom: 2px solid #cbd2d9; }}
th.left, td.left {{ text-align: left; }}
dl.words, dl.how {{ margin: 8px 0 0; display: grid; grid-template-columns: max-content 1fr; gap: 6px 18px; }}
dl.words dt, dl.how dt {{ font-weight: 600; }}
dl.words dd, dl.how dd {{ margin: 0; max-width: 70em; overflow-wrap: anywhere; }}
@media (max-width: 640px) {{
  main {{ padding: 16px 10px 32px; }}
  section {{ padding: 14px 12px; margin-top: 12px; }}
  h1 {{ font-size: 1.35rem; }}
  .headline {{ font-size: 1.05rem; }}
  .tiles {{ grid-template-columns: 1fr 1fr; }}
  dl.words, dl.how {{ grid-template-columns: 1fr; gap: 0; }}
  dl.words dd, dl.how dd {{ margin-bottom: 8px; }}
}}
"""
