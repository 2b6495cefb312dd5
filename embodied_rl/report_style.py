"""How the report looks: the frame of the page and its style sheet."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · training report</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --faint: #818b98; --line: #e4e8ec; --paper: #fff; --ground: #f6f8fa;
  --good: #2e8b57; --bad: #c83e3a; --accent: #2f6fb7; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 28px; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 14px; }
h3 { font-size: 14px; margin: 14px 0 6px; color: var(--soft); font-weight: 600; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px;
  margin-top: 18px; }
.note { color: var(--faint); font-size: 13px; margin: 12px 0 0; }
header .note { margin: 0 0 8px; }
.badge { font-size: 12px; font-weight: 600; vertical-align: 5px; padding: 2px 9px; border-radius: 99px;
  letter-spacing: 0; }
.badge.done { background: #dff3e7; color: #1d6b40; }
.badge.open { background: #fdf0d5; color: #855b00; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 16px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 12px 16px; }
.card b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.card b small { font-weight: 400; font-size: 13px; color: var(--soft); white-space: nowrap; }
.card.main { border-color: #bfd4ec; background: #f3f8fd; }
.card.small b { font-size: 14px; line-height: 30px; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.card span { color: var(--faint); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, details td, details th { text-align: left; }
tr:first-child th { color: var(--faint); font-weight: 500; font-size: 13px; }
th[scope=row] { font-weight: 500; }
tr:last-child > * { border-bottom: 0; }
tr.total > * { border-top: 2px solid var(--line); font-weight: 600; }
table.results { width: 100%; }
table.rates td:nth-child(2) { width: 36%; min-width: 130px; } table.rates th:nth-child(2) { text-align: left; }
table.words td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; width: 30%;
  border-left: 4px solid transparent; padding-left: 10px; font-size: 13px; }
table.words th { text-align: left; vertical-align: top; }
table.words td.success { border-left-color: var(--good); } table.words td.failure { border-left-color: var(--bad); }
td small { color: var(--soft); font-weight: 400; }
.bar { position: relative; height: 14px; background: #edf1f4; border-radius: 3px; }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--good); opacity: 0.85; border-radius: 3px; }
.bar.old i { background: var(--faint); }
td.two .bar { height: 10px; } td.two .bar + .bar { margin-top: 3px; }
td.two .bar u { top: 4px; }
.bar u { position: absolute; top: 6px; height: 2px; background: var(--ink); }
.bar u::before, .bar u::after { content: ""; position: absolute; top: -4px; height: 10px; width: 2px;
  background: var(--ink); }
.bar u::before { left: 0; } .bar u::after { right: 0; }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 14px; }
figure { margin: 0; }
.videos figure { border: 3px solid var(--faint); border-radius: 10px; overflow: hidden; background: var(--paper); }
.videos.pairs { grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
.videos figure.pair { border: 1px solid var(--line); }
.sides { display: grid; grid-template-columns: 1fr 1fr; font-size: 12px; }
.sides div { padding: 3px 8px; color: #fff; background: var(--faint); white-space: nowrap; overflow: hidden; }
.sides div.success { background: var(--good); } .sides div.failure { background: var(--bad); }
.sides div + div { border-left: 4px solid var(--paper); }
.videos figure.success { border-color: var(--good); } .videos figure.failure { border-color: var(--bad); }
.videos video { display: block; width: 100%; background: #dfe4e8; }
.videos figcaption { padding: 7px 10px 9px; font-size: 13px; line-height: 1.35; }
.videos em { font-style: normal; color: var(--faint); float: right; }
.videos figcaption::after { content: ""; display: block; clear: both; }
.videos .success em { color: var(--good); } .videos .failure em { color: var(--bad); }
.videos span { display: block; color: var(--soft); clear: both; }
.curves { display: grid; grid-template-columns: repeat(6, 1fr); gap: 22px 20px; }
.curves figure { grid-column: span 2; min-width: 0; } .curves figure.wide { grid-column: span 3; }
.curves figcaption { font-weight: 600; font-size: 13px; margin-bottom: 4px; }
.curves svg { display: block; width: 100%; height: auto; font-family: inherit; }
.curves svg text { font-family: inherit !important; }
.stack { display: flex; height: 22px; border-radius: 5px; overflow: hidden; margin-bottom: 12px; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
details { border-top: 1px solid var(--line); padding: 9px 0; }
details:first-of-type { border-top: 0; }
summary { cursor: pointer; font-weight: 500; }
pre { background: var(--ground); border-radius: 8px; padding: 14px; overflow-x: auto; font-size: 12.5px;
  line-height: 1.45; }
code { font-size: 13px; overflow-wrap: anywhere; }
@media (max-width: 820px) {
  .curves figure, .curves figure.wide { grid-column: span 6; }
  main { padding: 18px 12px 40px; } section { padding: 16px 14px; }
}
@media (max-width: 560px) {
  .videos { grid-template-columns: 1fr 1fr; gap: 8px; } .videos em { float: none; display: block; }
  .cards { grid-template-columns: 1fr 1fr; } .card b { font-size: 17px; }
}
"""
