//! What a run comes to: for people, and as JSON for scripts.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::tally::{Summary, Tally};
use crate::wire;

/// Everything that is printed.
pub(super) struct Report<'a> {
    pub address: &'a str,
    pub model: &'a wire::Generation,
    /// The load, in words.
    pub load: &'a str,
    /// The groups that were sent, on average, where each request was one of random tokens.
    pub workload: Option<Groups>,
    pub tally: &'a Tally,
    pub stopped: bool,
}

/// What `warm plan --workload` can count with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Groups {
    pub group: usize,
    pub prompt_tokens: f64,
    pub completion_tokens: f64,
}

impl Report<'_> {
    fn per_second(&self, count: u64) -> f64 {
        let seconds = self.tally.span().as_secs_f64();
        if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
    }

    fn fingerprint(&self) -> &str {
        self.model.stamp.as_ref().map_or("", |stamp| &stamp.fingerprint)
    }

    pub(super) fn json(&self) -> Value {
        let tally = self.tally;
        json!({
            "address": self.address,
            "model": {
                "architecture": self.model.architecture, "parameters": self.model.parameters, "dtype": self.model.dtype,
                "fingerprint": self.fingerprint(),
            },
            "load": self.load,
            "workload": self.workload,
            "stopped": self.stopped,
            "seconds": tally.span().as_secs_f64(),
            "requests": {
                "answered": tally.answers, "scored": tally.scored.summary().count, "good": tally.good, "warm_up": tally.warmed_up,
                "refused": tally.codes,
            },
            "per_second": {
                "requests": self.per_second(tally.scored.summary().count), "good": self.per_second(tally.good),
                "samples": self.per_second(tally.samples), "tokens": self.per_second(tally.tokens),
            },
            "samples": {"scored": tally.samples, "failed": tally.failures, "tokens": tally.tokens},
            "latency_ms": {
                "scored": milliseconds(&tally.scored.summary()), "refused": milliseconds(&tally.refused.summary()),
                "refused_since_sent": milliseconds(&tally.refusal.summary()),
            },
            "send_lag_ms": milliseconds(&tally.lag.summary()),
            "server_ms": {
                "queue": milliseconds(&tally.queue.summary()), "tokenize": milliseconds(&tally.tokenize.summary()),
                "forward": milliseconds(&tally.forward.summary()),
            },
            "reward_checksum": format!("{:016x}", tally.checksum()),
        })
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn milliseconds(summary: &Summary) -> Value {
    if summary.count == 0 {
        return Value::Null;
    }
    json!({
        "count": summary.count, "mean": ms(summary.mean), "p50": ms(summary.p50), "p90": ms(summary.p90), "p99": ms(summary.p99),
        "p99.9": ms(summary.p999), "max": ms(summary.max),
    })
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (model, tally) = (self.model, self.tally);
        let name: String = self.fingerprint().chars().take(12).collect();
        let millions = model.parameters as f64 / 1e6;
        writeln!(f, "{}: {} of {millions:.1} M parameters, {}, fingerprint {name}", self.address, model.architecture, model.dtype)?;
        writeln!(f, "{}{}", self.load, if self.stopped { " (stopped early)" } else { "" })?;
        writeln!(f, "{:.1} s measured, {} requests of warm-up before\n", tally.span().as_secs_f64(), tally.warmed_up)?;
        writeln!(f, "{:<10} {:>10} {:>10} {:>12} {:>12}", "", "requests", "per s", "samples/s", "tokens/s")?;
        let scored = tally.scored.summary().count;
        writeln!(
            f,
            "{:<10} {scored:>10} {:>10.1} {:>12.1} {:>12.0}",
            "scored",
            self.per_second(scored),
            self.per_second(tally.samples),
            self.per_second(tally.tokens)
        )?;
        writeln!(
            f,
            "{:<10} {:>10} {:>10.1} {:>12.1}",
            "good",
            tally.good,
            self.per_second(tally.good),
            self.per_second(tally.good_samples)
        )?;
        for (code, count) in &tally.codes {
            writeln!(f, "{:<10} {count:>10} {:>10.1}   {code}", "refused", self.per_second(*count))?;
        }
        writeln!(f, "\n{:<10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}", "ms", "p50", "p90", "p99", "p99.9", "max", "mean")?;
        let rows = [
            ("scored", &tally.scored),
            ("refused", &tally.refused),
            ("since sent", &tally.refusal),
            ("send lag", &tally.lag),
            ("queue", &tally.queue),
            ("tokenize", &tally.tokenize),
            ("forward", &tally.forward),
        ];
        for (name, times) in rows {
            let summary = times.summary();
            if summary.count > 0 {
                let columns = [summary.p50, summary.p90, summary.p99, summary.p999, summary.max, summary.mean];
                write!(f, "{name:<10}")?;
                for column in columns {
                    write!(f, " {:>10.2}", ms(column))?;
                }
                writeln!(f)?;
            }
        }
        write!(f, "\n{} rewards, {} samples failed, reward checksum {:016x}", tally.samples, tally.failures, tally.checksum())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tally::{Answer, Outcome, ServerTiming};
    use super::*;

    fn tally() -> Tally {
        let mut tally = Tally::new(Duration::ZERO, None);
        let timing = ServerTiming { forward: Duration::from_millis(8), ..ServerTiming::default() };
        let outcomes =
            [Outcome::Scored { rewards: vec![Some(1.0), Some(2.0)], tokens: 1000, timing }, Outcome::Refused("RESOURCE_EXHAUSTED")];
        for (number, outcome) in (0..).zip(outcomes) {
            let done = Duration::from_millis(2000 - 1990 * number);
            tally.record(&Answer { number, due: Duration::ZERO, sent: Duration::ZERO, done, outcome });
        }
        tally
    }

    fn with(report: impl FnOnce(Report)) {
        let groups = Groups { group: 4, prompt_tokens: 100.0, completion_tokens: 25.5 };
        let model = wire::Generation { architecture: "qwen3".into(), parameters: 60_000_000, ..Default::default() };
        report(Report { address: "here:1", model: &model, load: "closed loop", workload: Some(groups), tally: &tally(), stopped: true });
    }

    #[test]
    fn the_table_has_rates_quantiles_and_codes() {
        with(|report| {
            let text = report.to_string();
            for words in [
                "qwen3 of 60.0 M parameters",
                "closed loop (stopped early)",
                "scored              1        0.5          1.0          500",
                "refused             1        0.5   RESOURCE_EXHAUSTED",
                "2 rewards, 0 samples failed",
            ] {
                assert!(text.contains(words), "{words} is not in\n{text}");
            }
        });
    }

    #[test]
    fn json_has_the_same_numbers() {
        with(|report| {
            let json = report.json();
            assert_eq!(json["per_second"]["tokens"], 500.0);
            assert_eq!(json["workload"], json!({"group": 4, "prompt_tokens": 100.0, "completion_tokens": 25.5}));
            let rate = crate::offline::Rate::of_bench(&json, "bench.json").expect("a plan can read it");
            let plan = "group=4,prompts=1,prompt=100,completion=26".parse().expect("a workload");
            assert_eq!(rate, crate::offline::Rate::Measured { groups_per_second: 0.5, of: plan, source: "bench.json".to_owned() });
            assert_eq!(json["requests"]["refused"]["RESOURCE_EXHAUSTED"], 1);
            assert!(json["latency_ms"]["scored"]["p99.9"].as_f64().is_some_and(|ms| (ms - 2000.0).abs() < 3.0), "{json}");
            assert_eq!(json["reward_checksum"].as_str().map(str::len), Some(16));
        });
    }
}
