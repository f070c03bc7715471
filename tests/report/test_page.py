"""Tables by hand, and pages whose pictures all exist and whose texts are escaped."""

import re

import numpy as np

from jaxseg.report import page


def written(folder):
    """The page, whose pictures are all in its folder."""
    text = (folder / "index.html").read_text()
    shown = re.findall(r'<img src="(.*?)"', text)
    assert sorted(shown) == sorted(p.name for p in folder.glob("*.png"))
    return text, shown


def options(names):
    shown = {"image": np.full((8, 8, 3), 90, np.uint8), "mask": np.eye(8, dtype=np.uint8)}
    shown |= {"prediction": 1 - shown["mask"], "answers": np.ones((1, 8, 8))}
    shown["attention"] = np.eye(4)[None]
    metrics = [{"step": i, "loss": 1.0 + i} for i in range(3)]
    return dict(title="a < b", metrics=metrics, examples=[("best", shown)], names=names, config="&")


def test_cells():
    assert [page.cell(x) for x in (None, 0.5, 3, 0)] == ["", "0.5000", "3", "0"]


def test_page_of_an_object(tmp_path):
    categories = {"cat": {"foreground_iou": 0.25, "images": 2}, "ant": {"foreground_iou": None}}
    result = dict(split="val", step=7, foreground_iou=0.5, iou=0.125, categories=categories)
    page.write(tmp_path, result=result, **options(("background", "object")))
    text, shown = written(tmp_path)
    assert shown == ["curves.png", "examples.png", "categories.png"]
    assert "<h1>a &lt; b</h1><p>Split val, step 7.</p>" in text and "<pre>&amp;</pre>" in text
    assert "<th>foreground iou</th>" in text
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)][1:]
    assert [row[0] for row in rows] == ["all", "ant", "cat"]
    assert rows[0][4:6] == ["0.1250", "0.5000"] and rows[2][1] == "2" and set(rows[1][1:]) == {""}


def test_page_of_classes(tmp_path):
    names = ("sky", "<cat>", "dog")
    result = dict(split="test", step=7, miou=0.5, mean_accuracy=0.75, confusion=np.eye(3).tolist())
    result["per_class"] = {"sky": {"iou": 1.0, "pixels": 9}, "<cat>": {"iou": None}}
    page.write(tmp_path, result=result, asked=(1,), **options(names))
    text, shown = written(tmp_path)
    names = ("curves", "examples", "queries", "classes", "confusion")
    assert shown == [f"{name}.png" for name in names]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)][1:]
    assert [row[0] for row in rows] == ["mean", "sky", "&lt;cat&gt;", "dog"]
    assert rows[0][1:3] == ["0.5000", "0.7500"] and rows[1][1] == "1.0000" and rows[1][-1] == "9"


def test_a_page_without_a_table_s_rows(tmp_path):
    page.write_page(tmp_path / "p.html", title="t", table=[["", "x"]], captions={}, config="")
    assert "<th>x</th></tr></table>" in (tmp_path / "p.html").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["p.html"]
