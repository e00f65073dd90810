"""One page to look at: what was trained, losses, expert maps, scores, answers side by side, and how to do it again.

    python scripts/report.py results/runs/law
    python scripts/report.py results/runs/law results/runs/summary results/checkpoints/mine --output=report.html

RUN is a folder of scripts/pipeline.py, or one that train.py wrote; several come into the same charts and tables. The
page is one HTML file that asks the network for nothing (its Content-Security-Policy forbids it) and runs no script;
charts are SVG, light and dark go by the reader's settings. What a folder lacks is left out, with a sentence.

Every figure is that of a file: cards and tables carry it unrounded, as `<data value="96.4286">96.4</data>`. A model's
answers are untrusted: all text is escaped, and control characters show as a replacement character.

    folders -> read_run -> Run (plain data) -> a section each, of tables and charts -> page
             report_runs.py               report_training.py, report_evaluation.py; report_charts.py
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.files import check_output, write_text
from evaluation.run_folder import read_run
from scripts.report_charts import esc
from scripts.report_evaluation import samples, scores
from scripts.report_training import commands, expert_maps, losses, overview, what_was_trained
from utils import command_parser, positive, run_cli

THEMES = {  # the light page and the dark one: c<n> are the curves' colours, q<n> the heat map's from low to high
    "light": {
        "bg": "#f6f7fa", "card": "#ffffff", "ink": "#1a1f29", "soft": "#556070", "line": "#d9dee7", "accent": "#0b57b4",
        "good": "#0a6b3d", "bad": "#b3261e", "warn": "#805000", "base": "#69727f", "chosen": "#d4380d",
        "c": ["#0b62c4", "#b45309", "#0f766e", "#a21caf", "#b91c1c", "#4d7c0f", "#5b4bd6", "#9d174d"],
        "q": ["#f0f4fa", "#dbe7f6", "#bcd5ef", "#95bde5", "#6ba2d8", "#4585c8", "#2868b2", "#154c91", "#0a3166"],
    },
    "dark": {
        "bg": "#11141a", "card": "#1a1f28", "ink": "#e7eaf0", "soft": "#a7b0bf", "line": "#343c4a", "accent": "#86b8ff",
        "good": "#67d49a", "bad": "#ff9b92", "warn": "#f1bd63", "base": "#9aa4b5", "chosen": "#ff9d5c",
        "c": ["#6cb0ff", "#f5b14c", "#4fd1c0", "#e58cf2", "#ff8a80", "#a5d65b", "#a99bff", "#ff8fbd"],
        "q": ["#202733", "#1f3552", "#1f4470", "#245891", "#2d6eb1", "#4287cb", "#66a3de", "#95c2ee", "#d0e6fb"],
    },
}  # fmt: skip
CSS = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:0 0 .6rem}
h3{font-size:1.05rem;margin:1.3rem 0 .5rem;overflow-wrap:anywhere}
h4{margin:.7rem 0 .4rem;font-size:1rem}
h4 .soft{font-weight:400}
p{margin:.4rem 0 .8rem;max-width:78ch;overflow-wrap:anywhere}
a{color:var(--accent)}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:.8rem 0 1.2rem}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px;margin:0 0 18px;min-width:0}
section>:last-child,section>:last-child>:last-child{margin-bottom:0}
.soft,figcaption,footer{color:var(--soft);font-size:.9rem}
.cards,.pair{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr))}
.pair{grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));align-items:start}
.answers{display:grid;gap:6px 16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,210px),1fr))}
.cards>*,.pair>*,.answers>*{min-width:0}
.card{border:1px solid var(--line);border-left:5px solid var(--line);border-radius:8px;padding:12px 14px}
.card h3{margin:0 0 .3rem}
.card dl{margin:0;display:grid;grid-template-columns:auto 1fr;gap:2px 12px;font-size:.93rem}
.card dt{color:var(--soft)}
.card dd{margin:0;text-align:right;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;max-width:100%;margin:.4rem 0}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;min-width:min(100%,420px)}
th,td{padding:5px 14px 5px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th:not(.w){white-space:nowrap}
th:first-child{position:sticky;left:0;background:var(--card);min-width:7rem;max-width:45vw;
overflow-wrap:anywhere}
td.n,th.n{text-align:right;white-space:nowrap}
th[scope=row]{font-weight:600}
td.w{overflow-wrap:anywhere;min-width:9.6rem;max-width:22rem}
td.w:nth-child(2):last-child{max-width:52rem}
figure{margin:.5rem 0;min-width:0}
svg.chart{display:block;width:100%;height:auto;overflow:visible}
.pair svg.chart{max-width:560px}
svg text{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round;
fill:var(--ink);font-size:12.5px;font-family:inherit}
svg .tick{fill:var(--soft);font-size:11.5px}
svg .grid{stroke:var(--line);stroke-width:1}
svg .curve{fill:none;stroke-width:2;stroke-linejoin:round}
svg .raw{stroke-width:1;opacity:.3}
svg .ref{stroke:var(--base);stroke-dasharray:3 3}
svg .chosen{fill:none;stroke:var(--chosen);stroke-width:1.2}
svg .cut{fill:none;stroke:var(--ink);stroke-width:1.6}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;padding:0;margin:.2rem 0;font-size:.9rem}
.legend svg{width:26px;height:10px;margin-right:6px;vertical-align:middle}
.up{color:var(--good)}.down{color:var(--bad)}
.chip{display:inline-block;border:1px solid currentColor;border-radius:99px;padding:0 9px;font-size:.8rem;
font-weight:600;white-space:nowrap}
.right{color:var(--good)}.wrong{color:var(--bad)}.partly{color:var(--warn)}
.sample{border-top:1px solid var(--line);padding:2px 0 10px}
.sample .pair{gap:6px 16px}
.text{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--bg);border-radius:6px;padding:8px 10px;
margin:4px 0 8px;max-height:17rem;overflow:auto;font:.88rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.label{display:block;font-size:.85rem;font-weight:600;overflow-wrap:anywhere}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--accent)}
pre.text{margin:4px 0;white-space:pre;max-height:none}
a:focus-visible,summary:focus-visible,.scroll:focus-visible,.text:focus-visible{
outline:2px solid var(--accent);outline-offset:2px}
@media(max-width:560px){header,main,footer{padding-left:10px;padding-right:10px}section{padding:14px 12px}
h1{font-size:1.5rem}
table{font-size:.85rem}th,td{padding-right:10px}
.pair svg text{font-size:14px}.pair svg .tick{font-size:13.5px}}
@media(min-width:561px){th:first-child{min-width:11.5rem;max-width:20rem;overflow-wrap:break-word}
td.n+td.n,th.n+th.n{padding-left:10px}}
@media print{body{background:#fff}section{break-inside:avoid-page}.text{max-height:none}nav{display:none}}
"""


def theme(name: str) -> str:
    """CSS variables of a theme."""
    flat = {k: v for k, v in THEMES[name].items() if isinstance(v, str)}
    flat |= {f"{k}{n}": v for k in ("c", "q") for n, v in enumerate(THEMES[name][k])}
    return "".join(f"--{key}:{value};" for key, value in flat.items())


def page(folders: list[str | Path], count: int = 2, seed: int = 0) -> str:
    """The HTML of a report on `folders`, with `count` questions of each kind; drawn with `seed`.

    Raises:
        ValueError, FileNotFoundError: a folder that is no run, given twice, or with files that are damaged.
    """
    paths = [Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a folder is given twice; give each once")
    if len(set(names)) < len(names):
        names = list(map(str, paths))
    runs = [read_run(path, name, len(paths) == 1) for path, name in zip(paths, names)]
    trained = [t for run in runs for t in run.trained]
    evaluated = [label for run in runs for by in run.summaries.values() for label in by if label != run.base]
    labels = dict.fromkeys([*(t.label for t in trained), *evaluated])  # not all that was evaluated was trained here
    colours = {label: number for number, label in enumerate(labels)}
    sections = {
        "At a glance": overview(runs, colours),
        "What was trained": what_was_trained(trained),
        "Scores": scores(runs, colours),
        "Losses": losses(trained, colours),
        "Experts": expert_maps(trained),
        "Answers": samples(runs, count, seed),
        "Do it again": commands(runs),
    }
    ids = {name: name.lower().replace(" ", "-") for name in sections}
    title = f"Report: {', '.join(names)}"
    models = dict.fromkeys(str(t.settings.get("base_model_path")) for t in trained)
    dates = dict.fromkeys(sorted(str(t.environment["date"])[:10] for t in trained if t.environment.get("date")))
    subtitle = " · ".join(filter(None, [" and ".join(models), ", ".join(dates)]))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    body = "".join(
        f'<section id="{ids[name]}" aria-labelledby="h-{ids[name]}">'
        f'<h2 id="h-{ids[name]}">{name}</h2>{content}</section>'
        for name, content in sections.items()
    )
    links = "".join(f'<a href="#{ids[name]}">{name}</a>' for name in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{esc(title)}</title><style>:root{{color-scheme:light dark;{theme('light')}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{theme('dark')}}}}}{CSS}</style></head>"
        f'<body><header><h1>{esc(title)}</h1><p class="soft">{esc(subtitle)}</p>'
        f'<nav aria-label="sections">{links}</nav></header><main>{body}</main>'
        "<footer><p>Written by scripts/report.py from the files of the runs.</p></footer></body></html>\n"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders of scripts/pipeline.py or train.py")
    add("--output", metavar="FILE.html", help="the page (default: report.html in the first RUN)")
    add("--n_samples", type=positive, default=2, metavar="N", help="questions shown of each kind (best, worst, random) "
        "and data set (default: 2)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the random questions (default: 0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    output = Path(args.output or Path(args.runs[0]) / "report.html")
    if output.suffix not in (".html", ".htm"):
        raise ValueError(f"--output {output} must end in .html")
    text = page(args.runs, args.n_samples, args.seed)
    check_output(output)
    write_text(output, text)
    print(f"written to {output} ({len(text.encode()) / 1024:,.0f} KiB)")
    return output


if __name__ == "__main__":
    run_cli(main)
