//! Rules, dashboard and scaler read series that a real App has.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use prometheus::proto::MetricType;
use serde_norway::Value;
use warm::app::App;
use warm::clock::Clock;
use warm::config::{Resolved, Sources};

use super::expressions::{Selector, selectors};
use super::*;

/// What a target adds to every series, and what aggregations of ours add.
const FROM_OUTSIDE: [&str; 3] = ["namespace", "job", "instance"];

struct Family {
    histogram: bool,
    /// Values by label; those of histograms have `le`.
    labels: BTreeMap<String, BTreeSet<String>>,
}

/// Series of a fresh App, which shows all of them before its first request.
fn families() -> BTreeMap<String, Family> {
    let config = Resolved::new(Sources::default()).expect("defaults").config;
    let app = App::new(&config, Clock::manual(), "deploy".to_owned()).expect("app");
    let mut families = BTreeMap::new();
    for family in app.metrics().gather() {
        let mut labels: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for metric in family.get_metric() {
            for pair in metric.get_label() {
                labels.entry(pair.name().to_owned()).or_default().insert(pair.value().to_owned());
            }
            for bucket in metric.get_histogram().get_bucket() {
                labels.entry("le".to_owned()).or_default().insert(bucket.upper_bound().to_string());
            }
        }
        let histogram = family.get_field_type() == MetricType::HISTOGRAM;
        families.insert(family.name().to_owned(), Family { histogram, labels });
    }
    families
}

fn recorded(rules: &Value) -> BTreeSet<String> {
    let all = list(rules, "groups").iter().flat_map(|group| list(group, "rules"));
    all.filter_map(|rule| at(rule, "record").as_str().map(str::to_owned)).collect()
}

/// Panics unless the selector can find something.
fn assert_exists(place: &str, selector: &Selector, families: &BTreeMap<String, Family>, recorded: &BTreeSet<String>) {
    let name = &selector.name;
    if name == "up" {
        return;
    }
    if name.starts_with("warm:") {
        assert!(recorded.contains(name), "{place}: no rule records {name}");
        return;
    }
    let stem = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| Some((name.strip_suffix(suffix)?, *suffix)));
    let part_of_histogram = stem.filter(|(stem, _)| families.get(*stem).is_some_and(|family| family.histogram));
    let family = match part_of_histogram {
        Some((stem, _)) => &families[stem],
        None => families.get(name).filter(|family| !family.histogram).unwrap_or_else(|| panic!("{place}: there is no series {name}")),
    };
    for (label, operator, value) in &selector.matchers {
        if FROM_OUTSIDE.contains(&label.as_str()) {
            continue;
        }
        let values = family.labels.get(label).unwrap_or_else(|| panic!("{place}: {name} has no label {label}"));
        // A negative matcher may name what is not there; a regular expression may name what other builds have; what a reader of
        // the dashboard picks is one of the values.
        let found = match operator.as_str() {
            _ if value.starts_with('$') => true,
            "=" => values.contains(value),
            "=~" => value.split('|').any(|value| values.contains(value)),
            _ => true,
        };
        assert!(found, "{place}: {name} never has {label}={value:?}, only {values:?}");
    }
}

fn expressions_of_rules(rules: &Value) -> Vec<(String, String)> {
    let all = list(rules, "groups").iter().flat_map(|group| list(group, "rules"));
    let name = |rule: &Value| at(rule, "record").as_str().or(at(rule, "alert").as_str()).unwrap_or_default().to_owned();
    all.map(|rule| (name(rule), text(rule, "expr"))).collect()
}

/// Queries of the dashboard, with where they stand.
fn expressions_of_dashboard() -> Vec<(String, String)> {
    let dashboard: Value = serde_norway::from_str(&read("monitoring/warm.dashboard.json")).expect("JSON");
    let panels = list(&dashboard, "panels").iter();
    let of_panel = |panel: &Value| {
        let title = text(panel, "title");
        list(panel, "targets").iter().map(|target| (title.clone(), text(target, "expr"))).collect::<Vec<_>>()
    };
    let annotations = list(&dashboard, "annotations.list").iter().filter(|annotation| at(annotation, "expr").is_string());
    let annotations = annotations.map(|annotation| (text(annotation, "name"), text(annotation, "expr")));
    let variables = list(&dashboard, "templating.list").iter().filter(|variable| text(variable, "type") == "query");
    let variables = variables.map(|variable| (text(variable, "name"), text(variable, "definition")));
    panels.flat_map(of_panel).chain(annotations).chain(variables).collect()
}

#[test]
fn every_series_that_is_watched_is_one_that_the_server_has() {
    let (families, rules) = (families(), document("monitoring/warm.rules.yaml"));
    let recorded = recorded(&rules);
    let mut expressions = expressions_of_rules(&rules);
    expressions.extend(expressions_of_dashboard());
    let scaled = document("kustomize/overlays/fleet/scaledobject.yaml");
    expressions.extend(list(&scaled, "spec.triggers").iter().map(|trigger| ("scaler".to_owned(), text(trigger, "metadata.query"))));
    assert!(expressions.len() > 60, "{}", expressions.len());
    for (place, expression) in &expressions {
        let selectors = selectors(expression);
        assert!(!selectors.is_empty(), "{place}: reads nothing of ours: {expression}");
        for selector in &selectors {
            assert_exists(place, selector, &families, &recorded);
        }
    }
}

#[test]
fn a_wrong_name_label_or_value_would_be_found() {
    let (families, recorded) = (families(), BTreeSet::from(["warm:a:b".to_owned()]));
    for wrong in [
        "warm_scorer_no_such_total",
        "warm:no:such",
        "warm_scorer_queue_seconds",
        "warm_scorer_tokens_total{colour=\"red\"}",
        "warm_scorer_tokens_total{kind=\"forgotten\"}",
        "warm_serve_request_seconds_bucket{rpc=\"Score\",le=\"2.6\"}",
        "warm_scorer_queue_tokens_sum",
    ] {
        let selector = selectors(wrong).pop().expect("a selector");
        let caught = std::panic::catch_unwind(|| assert_exists("test", &selector, &families, &recorded));
        assert!(caught.is_err(), "{wrong}");
    }
}

#[test]
fn every_alert_has_a_severity_words_a_section_and_a_test() {
    let (rules, tests, runbook) = (document("monitoring/warm.rules.yaml"), document("monitoring/warm.rules.test.yaml"), read("RUNBOOK.md"));
    let alerts = list(&rules, "groups").iter().flat_map(|group| list(group, "rules")).filter(|rule| at(rule, "alert").is_string());
    let mut count = 0;
    for alert in alerts {
        let name = text(alert, "alert");
        assert!(["page", "ticket"].contains(&text(alert, "labels.severity").as_str()), "{name}");
        for annotation in ["summary", "runbook"] {
            assert!(text(alert, &format!("annotations.{annotation}")).len() > 20, "{name}: {annotation}");
        }
        assert!(runbook.lines().any(|line| line == format!("### {name}")), "RUNBOOK.md has no section {name}");
        let fires = |case: &Value| text(case, "alertname") == name && !list(case, "exp_alerts").is_empty();
        let cases = list(&tests, "tests").iter().flat_map(|test| list(test, "alert_rule_test"));
        assert!(cases.clone().any(fires), "no test raises {name}");
        count += 1;
    }
    assert!(count >= 16, "{count} alerts");
}

#[test]
fn the_rules_of_the_operator_are_the_rules() {
    let (rules, operator) = (document("monitoring/warm.rules.yaml"), document("monitoring/prometheusrule.yaml"));
    assert_eq!(at(&operator, "spec"), &rules, "run deploy/monitoring/prometheusrule.sh");
}

#[test]
fn panels_do_not_overlap_and_say_what_they_show() {
    let dashboard: Value = serde_norway::from_str(&read("monitoring/warm.dashboard.json")).expect("JSON");
    let panels = list(&dashboard, "panels");
    let ids: BTreeSet<u64> = panels.iter().map(|panel| number(panel, "id")).collect();
    assert_eq!(ids.len(), panels.len());
    let mut taken = BTreeSet::new();
    for panel in panels {
        let of = |field: &str| number(panel, &format!("gridPos.{field}"));
        for x in of("x")..of("x") + of("w") {
            for y in of("y")..of("y") + of("h") {
                assert!(x < 24 && taken.insert((x, y)), "{}: overlaps at {x}, {y}", text(panel, "title"));
            }
        }
    }
}

#[test]
fn prometheus_scrapes_what_compose_serves() {
    let (compose, prometheus) = (document("compose.yaml"), document("compose/prometheus.yaml"));
    let target = text(&prometheus, "scrape_configs.0.static_configs.0.targets.0");
    let (host, port) = target.split_once(':').expect("host and port");
    assert!(!at(&compose, &format!("services.{host}")).is_null());
    let config = Resolved::new(Sources::default()).expect("defaults").config;
    assert_eq!(port, config.admin_listen.port().to_string());
    assert_eq!(text(&prometheus, "scrape_configs.0.job_name"), "warm", "`up{{job=\"warm\"}}` in the rules");
    for volume in ["prometheus", "grafana"].iter().flat_map(|service| list(&compose, &format!("services.{service}.volumes"))) {
        let volume = volume.as_str().expect("short form");
        if let Some(path) = volume.strip_prefix("./").and_then(|rest| rest.split(':').next()) {
            assert!(root().join("deploy").join(path).exists(), "{path}");
        }
    }
}

#[test]
fn promtool_agrees() {
    if !have("promtool", "promtool check rules, promtool test rules") {
        return;
    }
    let folder = root().join("deploy/monitoring");
    output(Command::new("promtool").args(["check", "rules", "warm.rules.yaml"]).current_dir(&folder));
    output(Command::new("promtool").args(["test", "rules", "warm.rules.test.yaml"]).current_dir(&folder));
}
