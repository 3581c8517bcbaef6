//! The README is held to the program: its tables are what the code says, and what it tells people to run exists.

use std::path::Path;

use prometheus::proto::MetricType;
use warm::app::App;
use warm::clock::Clock;
use warm::config::{Resolved, SETTINGS, Sources};

fn readme() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).expect("README.md")
}

/// A table cell: a bar would end it.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn assert_table(name: &str, rows: &[String]) {
    let readme = readme();
    let missing: Vec<&String> = rows.iter().filter(|row| !readme.lines().any(|line| line == row.as_str())).collect();
    assert!(missing.is_empty(), "README.md lacks rows of its table of {name}; the whole table is\n{}\n", rows.join("\n"));
}

#[test]
fn every_setting_stands_in_its_table_and_no_other() {
    let rows: Vec<String> = SETTINGS
        .iter()
        .map(|setting| {
            let default = if setting.default.is_empty() { String::new() } else { format!("`{}`", setting.default) };
            format!("| `{}` | {default} | {} |", setting.key, cell(setting.help))
        })
        .collect();
    assert_table("settings", &rows);
    let section = readme();
    let section = section.split("\n## Settings").nth(1).and_then(|rest| rest.split("\n## ").next()).expect("a section").to_owned();
    let listed = section.lines().filter(|line| line.starts_with("| `")).count();
    assert_eq!(listed, rows.len(), "a row of the table names no setting");
}

/// What a series counts or measures, by how its name ends (before `_total`).
const UNITS: [(&str, &str); 23] = [
    ("_seconds", "seconds"),
    ("_bytes", "bytes"),
    ("tokens", "tokens"),
    ("samples", "samples"),
    ("requests", "calls"),
    ("reward", "reward"),
    ("_devices", "devices"),
    ("_members", "members"),
    ("_generations", "generations"),
    ("_packs", "packs"),
    ("_cache", "loads"),
    ("_reloads", "loads"),
    ("_doubled_bos", "texts"),
    ("_failures", "samples"),
    ("_skipped", "samples, calls"),
    ("_shed", "calls"),
    ("_restart_needed", "settings"),
    ("_canary", "by figure"),
    ("_now", "by figure"),
    ("_first_hour", "by figure"),
    ("_info", "1"),
    ("_ready", "0 or 1"),
    ("_reloading", "0 or 1"),
];

fn unit(name: &str) -> &'static str {
    let stem = name.strip_suffix("_total").unwrap_or(name);
    let found = UNITS.iter().find(|(end, _)| stem.ends_with(end));
    found.unwrap_or_else(|| panic!("{name}: say its unit, in its name or in UNITS")).1
}

#[test]
fn every_series_stands_in_its_table_and_no_other() {
    let config = Resolved::new(Sources::default()).expect("defaults").config;
    let app = App::new(&config, Clock::manual(), "readme".to_owned()).expect("app");
    let families = app.metrics().gather();
    let own = families.iter().filter(|family| family.name().starts_with("warm_"));
    let rows: Vec<String> = own
        .map(|family| {
            let kind = match family.get_field_type() {
                MetricType::COUNTER => "counter",
                MetricType::GAUGE => "gauge",
                MetricType::HISTOGRAM => "histogram",
                _ => "other",
            };
            let labels = family.get_metric().first().map(|metric| metric.get_label()).unwrap_or_default();
            let labels: Vec<String> = labels.iter().map(|label| format!("`{}`", label.name())).collect();
            format!("| `{}` | {kind} | {} | {} | {} |", family.name(), labels.join(", "), unit(family.name()), cell(family.help()))
        })
        .collect();
    assert_table("metrics", &rows);
    let listed = readme().lines().filter(|line| line.starts_with("| `warm_")).count();
    assert_eq!(listed, rows.len(), "a row of the table names no series");
}

#[test]
fn the_two_commands_are_there() {
    let readme = readme();
    for command in ["cargo run --release -- demo", "cargo test"] {
        assert!(readme.lines().any(|line| line == command), "{command}");
    }
}
