"""How a page looks: one style sheet for light and dark, wide and narrow, screen and paper. No markup, no numbers.

Colours of curves are those of Okabe and Ito, darkened (light) or lightened (dark) until each has a contrast of 3 to 1
with its background; dashes tell them apart where colours do not.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --grid: #e6e9ed;
  --accent: #0b62a8; --warn: #fff4d6; --warn-ink: #5c4300;
  --c0: #0072b2; --c1: #c2500a; --c2: #00805d; --c3: #a3497d; --c4: #8a6d00; --c5: #5b5fc7;
  --heat: 11, 98, 168;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111418; --card: #1a1e24; --ink: #e8ebef; --soft: #a3adb8; --line: #363d46; --grid: #2b3139;
    --accent: #7cc4ff; --warn: #3b2f0b; --warn-ink: #ffe2a0;
    --c0: #56b4e9; --c1: #f28e4b; --c2: #2fc79a; --c3: #e59ac5; --c4: #e3c34a; --c5: #a5a9ff;
    --heat: 104, 184, 250;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; }
p { margin: .25rem 0 .75rem; max-width: 75ch; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.state { display: inline-block; border: 1px solid var(--line); border-radius: 1rem; padding: 0 .7rem;
  background: var(--card); font-size: .875rem; }
.alert { background: var(--warn); color: var(--warn-ink); border-radius: .5rem; padding: .6rem .9rem; max-width: none;
  white-space: pre-wrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.5rem), 1fr)); gap: .6rem;
  margin: 1rem 0 0; }
.figures div, figure, .sheet { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.figures div { padding: .5rem .75rem; }
.figures dt { font-size: .8rem; color: var(--soft); }
.figures dd { margin: 0; font-size: 1.05rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .8rem;
  align-items: start; }
figure { margin: 0; padding: .75rem .75rem .5rem; min-width: 0; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .3rem; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .8rem; color: var(--soft); margin: 0 0 .2rem;
  padding: 0; list-style: none; overflow-wrap: anywhere; }
.legend li { display: flex; align-items: center; gap: .35rem; min-width: 0; }
.legend svg { flex: none; width: 22px; height: 12px; }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
figure > svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 11px; font-family: inherit; }
svg .in { fill: var(--ink); font-size: 8px; text-anchor: middle; }
svg .in.dark { fill: var(--card); }
.rule { stroke: var(--grid); stroke-width: 1; }
.axis { stroke: var(--line); stroke-width: 1; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.d1 { stroke-dasharray: 6 4; } .d2 { stroke-dasharray: 1.5 4; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); }
.s3 { stroke: var(--c3); } .s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); }
.dot { fill: var(--card); stroke-width: 1.5; }
.l0 { fill: var(--grid); fill-opacity: .55; }
.l1 { fill: rgba(var(--heat), .22); } .l2 { fill: rgba(var(--heat), .42); } .l3 { fill: rgba(var(--heat), .6); }
.l4 { fill: rgba(var(--heat), .8); } .l5 { fill: rgb(var(--heat)); }
.tip { fill: transparent; } .tip:hover { stroke: var(--ink); stroke-width: 1.5; }
details { margin-top: .4rem; font-size: .875rem; }
summary { cursor: pointer; color: var(--accent); width: fit-content; max-width: 100%; }
summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.scroll { overflow: auto; max-height: 26rem; margin-top: .3rem; }
.sheet { padding: .25rem .75rem; }
.charts + .sheet, .sheet + .sheet, p + .charts { margin-top: .8rem; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { color: var(--soft); font-weight: 600; background: var(--card); white-space: nowrap; }
thead th { position: sticky; top: 0; }
td { font-variant-numeric: tabular-nums; min-width: 3.5rem; max-width: 34rem; overflow-wrap: break-word; }
footer { margin-top: 2.5rem; font-size: .85rem; color: var(--soft); }
@media (max-width: 40rem) { td { max-width: 12rem; } }
@media print { .scroll { max-height: none; } figure, .figures div { break-inside: avoid; } }
"""
