"""A log with everything that a log can have, and a reader of the pages that are made of logs."""

from __future__ import annotations

from html.parser import HTMLParser

from disback_plugin.plugins.run_log import RunLog

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """A page whose tags all close in order; its tags, texts, addresses and the numbers of each figure's table."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.ids, self.figures = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "figure" and attributes.get("class") == "card":
            self.figures.append({"title": "", "rows": [], "svg": 0})
        elif tag == "svg" and "figure" in self.open:
            self.figures[-1]["svg"] += 1
        elif tag == "tr" and "figure" in self.open and "tbody" in self.open:
            self.figures[-1]["rows"].append([])
        elif tag == "td" and "figure" in self.open:
            self.figures[-1]["rows"][-1].append(None)
        elif tag == "data" and "figure" in self.open:
            self.figures[-1]["rows"][-1][-1] = float(attributes["value"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "h3" and "figure" in self.open:
            self.figures[-1]["title"] += text


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


def a_log(folder, name, scale=1.0):
    """A run with everything that a log can have."""
    (folder / f"{name}.png").write_bytes(PNG)
    log = RunLog(folder / f"{name}.log.jsonl")
    log.begin("attach", recording=0, teacher="f" * 64, settings={"schedule": "<Ramp & co>", "record": 10})
    for i in range(2, 11):
        log.log({"agreement": scale * (1 - i / 8)}, 0, recording=i)
        log.log({"loss": 3.0 / i}, 0, recording=i)
    for index in (1, 2):
        node = {"index": index, "iteration": 5 * index, "bytes": 700, "delta_norm": 0.3}
        log._write({"update": 0, "recording": 5 * index, "recorded": node | {"weight_error": 0.004 * scale}})
    log._write({"update": 0, "recording": 10, "completed": {"iterations": 10, "fitted": 8, "ended": None}})
    for update in range(0, 41, 10):
        moved = {
            "position": 2 - update / 20,
            "node": 2,
            "gradient": 0.2 + update / 50,
            "swap_ms": 0.7,
            "delta_norm": 0.1,
        }
        log.log(moved, update)
        log.log({"distance": scale * (50 - update) / 3, "loss": float("nan") if update == 20 else 1.0}, update)
    log.log({"masked_samples": 3, "samples": folder / f"{name}.png"}, 40)
    return log.file
