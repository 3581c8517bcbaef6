//! What the watch on rewards costs at share 0, where it only counts: the same samples scored with it and without it.
//!
//! `cargo bench --bench watch` takes turns and prints medians. On a shared machine these wobble by more than what is sought, so
//! instructions decide; they are counted by valgrind, and what both runs do before the calls cancels:
//!
//!     cargo bench --bench watch --no-run
//!     for calls in watched:40 unwatched:40 unwatched:20; do
//!         CALLS=$calls valgrind --tool=callgrind --callgrind-out-file=/dev/null target/release/deps/watch-...
//!     done
//!
//! The watch costs `(first - second) / (2 * (second - third))` of the work.

use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use warm::app::{App, load_spec, loader};
use warm::clock::Clock;
use warm::config::{Resolved, Sources};
use warm::domain::{Conversation, Sample};
use warm::registry::{CallOptions, Engine, Watched};
use warm::scorer::Permit;

fn engine() -> Engine {
    let folders = (0..5).map(|i| format!("{}/demo/family/rm-{i}", env!("CARGO_MANIFEST_DIR")).into()).collect();
    // The same samples come again and again, and what is kept of them would make the work less than it is.
    let flags = [("shadow.share", "0"), ("threads", "1"), ("prefix_cache_bytes", "off")];
    let flags = flags.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    let config = Resolved::new(Sources { flags, folders, ..Sources::default() }).expect("settings").config;
    let clock = Clock::system();
    let app = App::new(&config, clock.clone(), "bench".to_owned()).expect("app");
    app.load(loader(load_spec(&config).expect("the bundled family"), clock), &mut |_| {}).expect("loaded");
    app.engine().clone()
}

/// A prompt with short answers: the less a forward costs, the more of it the watch is.
fn samples(count: usize) -> Vec<Sample> {
    let answer = |i: usize| format!("Answer {i} gives its reason.");
    (0..count).map(|i| Sample::Conversation(Conversation::user("Why is the sky blue?").answered(answer(i)))).collect()
}

fn score(runtime: &Runtime, engine: &Engine, count: usize, watched: bool) {
    let watched = watched.then(|| Watched { tenant: "bench".into(), prompts: vec![count] });
    let call = engine.score(samples(count), CallOptions { watched, ..CallOptions::default() }, Permit::unlimited());
    let reply = runtime.block_on(call).expect("scored");
    assert!(reply.outcomes.iter().all(Result::is_ok));
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let engine = engine();
    if let Ok(calls) = std::env::var("CALLS") {
        let (mode, calls) = calls.split_once(':').expect("watched:COUNT or unwatched:COUNT");
        let calls: usize = calls.parse().expect("a number of calls");
        (0..calls).for_each(|_| score(&runtime, &engine, 16, mode == "watched"));
        return;
    }
    let rounds = if std::env::args().any(|argument| argument == "--test") { 1 } else { 400 };
    for count in [1, 16, 256] {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            for (watched, times) in [(true, &mut with), (false, &mut without)] {
                let begin = Instant::now();
                score(&runtime, &engine, count, watched);
                times.push(begin.elapsed());
            }
        }
        let (with, without) = (median(with), median(without));
        let cost = 100.0 * (with.as_secs_f64() / without.as_secs_f64() - 1.0);
        println!("{count:3} short samples a call, median: watched {with:?}, unwatched {without:?}: {cost:+.2} %");
    }
}
