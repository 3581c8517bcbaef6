"""The parts of check.sh that are no one-liners: schemas, load, queries."""

import html.parser
import json
import re
import sys
import time
import urllib.parse
import urllib.request

import yaml

# Kinds that come with operators; Kubernetes has no schema for them.
OPERATORS = {"ScaledObject", "PodMonitor", "PrometheusRule"}


def schemas(paths):
    import kubernetes_validate

    version = kubernetes_validate.latest_version()
    checked, left = 0, []
    for path in paths:
        for document in yaml.safe_load_all(open(path)):
            name = f"{document['kind']}/{document['metadata']['name']}"
            if document["kind"] in OPERATORS:
                left.append(name)
                continue
            kubernetes_validate.validate(document, version, strict=True)
            checked += 1
    print(f"{checked} objects fit the schemas of Kubernetes {version}; without a schema there: {', '.join(sorted(set(left)))}")


def namespace(path):
    """The one namespace of all objects."""
    (name,) = {document["metadata"]["namespace"] for document in yaml.safe_load_all(open(path))}
    print(name)


def samples(path):
    """The demo's prompts as groups, some too long, so that failures are seen too."""
    for line in open(path):
        row = json.loads(line)
        print(json.dumps({"prompt": row["prompt"], "completions": row["completions"]}))
        print(json.dumps({"text": row["completions"][0]}))
    print(json.dumps({"text": "too long " * 4000}))


def settled(address):
    """Waits until nothing more becomes of what was drawn for the members."""
    before = None
    while True:
        with urllib.request.urlopen(address, timeout=30) as answer:
            now = json.load(answer)["shadow_samples"]
        if now == before:
            return
        before = now
        time.sleep(0.5)


def ask(server, query):
    address = f"{server}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(address, timeout=30) as answer:
        body = json.load(answer)
    assert body["status"] == "success", f"{query}: {body}"
    return body["data"]["result"]


def fill(query):
    for name in ("namespace", "job", "instance", "tenant"):
        query = query.replace(f"${name}", ".*")
    return query.replace("$__rate_interval", "30s").replace("$__range", "2m")


def queries(server, dashboard, rules, fleet):
    failed, panels, records, alerts = [], 0, 0, 0
    board = json.load(open(dashboard))
    variables = [variable for variable in board["templating"]["list"] if variable["type"] == "query"]
    for variable in variables:
        # As Grafana asks: the values of one label. Both places hold the same words; which is read depends on its version.
        assert variable["definition"] == variable["query"]["query"], variable["name"]
        selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", fill(variable["definition"])).groups()
        if not any(sample["metric"].get(label) for sample in ask(server, f"count by ({label}) ({selector})")):
            failed.append(f"variable {variable['name']}: {variable['definition']}")
    marks = [mark for mark in board["annotations"]["list"] if "expr" in mark]
    for mark in marks:
        # Nothing is marked where nothing happened; what is counted is there all the same.
        ask(server, fill(mark["expr"]))
        if not ask(server, fill(mark["expr"]).removesuffix(" > 0")):
            failed.append(f"annotation {mark['name']!r}: {mark['expr']}")
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            panels += 1
            query = fill(target["expr"])
            if "warm_watch_first_hour" in query:
                # NaN before an hour is over, and left out by the comparison; the series are there all the same.
                if not ask(server, query.replace(" > -Inf", "")):
                    failed.append(f"panel {panel['title']!r}: {target['expr']}")
                continue
            result = ask(server, query)
            if not any(sample["value"][1] != "NaN" for sample in result):
                failed.append(f"panel {panel['title']!r}: {target['expr']}")
    for group in yaml.safe_load(open(rules))["groups"]:
        for rule in group["rules"]:
            if "record" in rule:
                records += 1
                if not ask(server, rule["record"]):
                    failed.append(f"record {rule['record']}")
            else:
                # An alert is silent here; its query must be one, and everything that it reads must be there.
                alerts += 1
                ask(server, rule["expr"])
                for name in set(re.findall(r"\b(?:warm_\w+|warm:[\w:]+|process_\w+)", rule["expr"])):
                    if not ask(server, name):
                        failed.append(f"alert {rule['alert']}: {name}")
    scalers = [document for document in yaml.safe_load_all(open(fleet)) if document["kind"] == "ScaledObject"]
    for trigger in [trigger for scaler in scalers for trigger in scaler["spec"]["triggers"]]:
        query = trigger["metadata"]["query"]
        if len(ask(server, query)) != 1:
            failed.append(f"scaler: {query}: expected one number")
    firing = sorted({sample["metric"]["alertname"] for sample in ask(server, 'ALERTS{alertstate="firing"}')})
    print(f"{panels} queries of the dashboard, {len(variables)} variables, {len(marks)} annotations, {records} records, {alerts} alerts and the scaler against Prometheus; firing: {firing or 'none'}")
    assert not failed, "no data:\n" + "\n".join(failed)
    assert not firing, "an alert fires on a healthy server"


class Page(html.parser.HTMLParser):
    """The texts of a page by the ids that they stand below, and the bars of its histogram of rewards."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.bars = [], {}, []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.open.append(attributes.get("id"))
        if tag == "rect" and "rewards" in self.open:
            self.bars.append(float(attributes["height"]))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, words):
        for name in filter(None, self.open):
            self.texts[name] = self.texts.get(name, "") + words


def page(path, width):
    """What stands in the status page of a server that has been scoring."""
    seen = Page()
    seen.feed(open(path).read())
    text = seen.texts
    assert text["phase"] == "ready", f"it says {text['phase']!r}"
    members = re.findall(r"rm-\d", text["model"])
    assert len(members) >= 2, f"the model's card names no members: {text['model']!r}"
    assert sum(bar > 0 for bar in seen.bars) >= 2, f"no histogram of rewards: {seen.bars}"
    for name in ("samples", "tokens", "latency", "busy", "watch", "compared", "tenants", "reloads"):
        assert re.search(r"\d", text[name]), f"no number in {name}: {text[name]!r}"
    print(f"status page, {width} wide: ready, {len(members)} members, {len(seen.bars)} bars of rewards")


def metrics(address, readme):
    """The README's table is what a live server shows, both ways."""
    with urllib.request.urlopen(address, timeout=30) as answer:
        live = {line.split(" ")[2] for line in answer.read().decode().splitlines() if line.startswith("# TYPE warm_")}
    table = set(re.findall(r"^\| `(warm_\w+)` \|", open(readme).read(), re.MULTILINE))
    assert live == table, f"only live: {sorted(live - table)}; only in the README: {sorted(table - live)}"
    print(f"{len(live)} series of the live server are the README's table")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "schemas":
        schemas(arguments)
    else:
        {"namespace": namespace, "samples": samples, "settled": settled, "queries": queries, "page": page, "metrics": metrics}[command](*arguments)
