//! A fleet on one machine: four processes behind a client that takes turns, one sample a request, while one of them joins late,
//! all are restarted one by one, some are killed, and the model is swapped on all of them at once. `deploy/rehearse.sh` runs it
//! for longer and prints its figures.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use warm::client::{Client, Fleet};
use warm::clock::Clock;
use warm::wire::{self, sample::Input};

use super::binary::{serve_at, terminate, warm};
use super::live::Files;
use super::running::Running;

const SERVERS: usize = 4;
const CALLERS: usize = 8;
/// Completions of one prompt, one request each.
const GROUP: u64 = 4;
/// Samples that differ.
const SAMPLES: u64 = 200;
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often the client asks which servers there are.
const SEARCH: Duration = Duration::from_millis(250);
/// Settings of every server: a reload stages, and `warm activate` swaps.
const STAGED: &str = "activate: on_call\n";

const PHASES: [&str; 5] = ["three servers", "a fourth joins", "rolling restarts", "killed without mercy", "swaps of the model"];

/// Ports that were free a moment ago. A server that restarts needs the one it had, so they are not among those that a system
/// hands out by itself, as it does to everything that runs beside this.
fn ports() -> Vec<String> {
    let from = 20_000 + (std::process::id() % 10_000) as u16;
    let free = (from..32_000).filter(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok());
    let found: Vec<_> = free.take(SERVERS).map(|port| format!("127.0.0.1:{port}")).collect();
    assert_eq!(found.len(), SERVERS, "free ports from {from} on");
    found
}

/// A server that ends with the test, however the test ends.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended already cannot be killed, and need not be.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a server and waits until it is ready; its log is read to its end elsewhere, so that it never blocks on it.
fn start(address: &str, config: &Path) -> Server {
    let config = config.to_str().expect("a plain path");
    let settings = ["--drain-delay", "300ms", "--threads", "1", "--config", config];
    let mut server = serve_at(address, &settings, Vec::<PathBuf>::new());
    let mut log = BufReader::new(server.stderr.take().expect("piped"));
    let mut line = String::new();
    while !line.contains("ready") {
        line.clear();
        assert!(log.read_line(&mut line).expect("log") > 0, "{address}: the log ended before it was ready");
    }
    std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    Server(server)
}

fn request(number: u64, fingerprint: &str) -> wire::ScoreRequest {
    let ids = (0..10 + number % 40).map(|k| 10 + ((number * 31 + k * 7) % 300) as u32).collect();
    let sample = wire::Sample { input: Some(Input::Tokens(wire::TokenIds { ids })) };
    let options = wire::ScoreOptions { fingerprint: fingerprint.to_owned(), ..Default::default() };
    wire::ScoreRequest { request_id: number.to_string(), samples: vec![sample], options: Some(options), ..Default::default() }
}

/// What a server that nobody disturbs answers, and the name of its model.
fn undisturbed(runtime: &Runtime, address: &str) -> (String, Vec<f32>) {
    runtime.block_on(async {
        let client = Client::connect(address).await.expect("connected");
        let (mut name, mut scores) = (String::new(), Vec::new());
        for number in 0..SAMPLES {
            let response = client.score(request(number, "")).await.expect("scored");
            name = response.model.expect("a stamp").fingerprint;
            scores.push(response.scores[0].reward.expect("a score"));
        }
        (name, scores)
    })
}

/// What one caller has seen.
#[derive(Default)]
struct Seen {
    /// Answers by phase and process.
    answered: BTreeMap<(usize, String), u64>,
    latencies: BTreeMap<usize, Vec<Duration>>,
    problems: Vec<String>,
    /// Prompts by the model that scored their completions.
    prompts: BTreeMap<String, u64>,
}

impl Seen {
    fn merge(&mut self, other: Self) {
        other.answered.into_iter().for_each(|(key, count)| *self.answered.entry(key).or_default() += count);
        other.latencies.into_iter().for_each(|(phase, took)| self.latencies.entry(phase).or_default().extend(took));
        other.prompts.into_iter().for_each(|(name, count)| *self.prompts.entry(name).or_default() += count);
        self.problems.extend(other.problems);
    }

    /// Answers of a phase, by process.
    fn by_process(&self, phase: usize) -> BTreeMap<&str, u64> {
        let of_phase = self.answered.iter().filter(|((found, _), _)| *found == phase);
        of_phase.map(|((_, instance), count)| (instance.as_str(), *count)).collect()
    }
}

/// Callers, and what they share with the one who directs the rehearsal.
struct Load {
    stop: Arc<AtomicBool>,
    phase: Arc<AtomicUsize>,
    /// Samples that were answered.
    answered: Arc<watch::Sender<u64>>,
    /// Processes that have answered.
    instances: Arc<watch::Sender<BTreeSet<String>>>,
    callers: Vec<JoinHandle<Seen>>,
}

impl Load {
    fn start(runtime: &Runtime, fleet: Fleet, expected: BTreeMap<String, Vec<f32>>) -> Self {
        let (fleet, expected) = (Arc::new(fleet), Arc::new(expected));
        let (stop, phase, answered, instances) = (Arc::default(), Arc::default(), Arc::default(), Arc::default());
        let mut load = Self { stop, phase, answered, instances, callers: Vec::new() };
        for caller in 0..CALLERS as u64 {
            let task = load.caller(caller * 1000, fleet.clone(), expected.clone());
            load.callers.push(runtime.spawn(task));
        }
        load
    }

    /// Prompt after prompt: the first completion learns which model is live, and the others name it.
    fn caller(&self, first: u64, fleet: Arc<Fleet>, expected: Arc<BTreeMap<String, Vec<f32>>>) -> impl Future<Output = Seen> + use<> {
        let (stop, phase, answered, instances) = (self.stop.clone(), self.phase.clone(), self.answered.clone(), self.instances.clone());
        async move {
            let (mut seen, mut number) = (Seen::default(), first);
            while !stop.load(Ordering::Relaxed) {
                let mut pinned = String::new();
                for _ in 0..GROUP {
                    let (sample, now) = (number % SAMPLES, phase.load(Ordering::Relaxed));
                    number += 1;
                    let asked = Clock::system().now();
                    let response = match fleet.score(request(sample, &pinned), TIMEOUT).await {
                        Ok(response) => response,
                        Err(error) => {
                            seen.problems.push(format!("{}: sample {sample} of {pinned:?}: {error}", PHASES[now]));
                            continue;
                        }
                    };
                    seen.latencies.entry(now).or_default().push(Clock::system().now() - asked);
                    let stamp = response.model.unwrap_or_default();
                    if !pinned.is_empty() && stamp.fingerprint != pinned {
                        seen.problems.push(format!("{}: {pinned} was asked for, {} answered", PHASES[now], stamp.fingerprint));
                    }
                    if response.scores[0].reward != expected.get(&stamp.fingerprint).map(|scores| scores[sample as usize]) {
                        seen.problems.push(format!("{}: sample {sample} by {}: {:?}", PHASES[now], stamp.fingerprint, response.scores[0]));
                    }
                    pinned = stamp.fingerprint;
                    *seen.answered.entry((now, stamp.instance.clone())).or_default() += 1;
                    instances.send_if_modified(|instances| instances.insert(stamp.instance));
                    answered.send_modify(|answered| *answered += 1);
                }
                *seen.prompts.entry(pinned).or_default() += 1;
            }
            seen
        }
    }

    /// Some work is done before it goes on.
    fn after_more(&self, runtime: &Runtime, samples: u64) {
        let target = *self.answered.borrow() + samples;
        let mut seen = self.answered.subscribe();
        runtime.block_on(async { drop(seen.wait_for(|&answered| answered >= target).await.expect("callers go on")) });
    }

    /// Waits until so many processes have answered. One that came back is tried again after a while, which on a busy machine may
    /// be later than that; what is wrong then is told by who counts.
    fn until_answered_by(&self, runtime: &Runtime, processes: usize) {
        runtime.block_on(async {
            let (clock, mut seen) = (Clock::system(), self.instances.subscribe());
            tokio::select! {
                _ = seen.wait_for(|instances| instances.len() >= processes) => {}
                () = clock.sleep_until(clock.now() + 2 * TIMEOUT) => {}
            }
        });
    }

    fn next_phase(&self) {
        self.phase.fetch_add(1, Ordering::Relaxed);
    }

    fn end(self, runtime: &Runtime) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Seen::default();
        self.callers.into_iter().for_each(|caller| all.merge(runtime.block_on(caller).expect("no panic")));
        all
    }
}

/// A verb over the whole fleet, which must succeed.
fn verb(arguments: &[&str], all: &str) -> String {
    let output = warm().args(arguments).args(["--all", all]).output().expect("ran");
    let words = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {words}");
    words
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_names_a_model_finds_the_server_that_serves_it() {
    let folders = super::members();
    let (one, two) = (Running::start(folders[..2].to_vec(), &[]).await, Running::start(folders, &[]).await);
    let fleet = Fleet::new(&[one.address.clone(), two.address.clone()], Clock::system()).expect("addresses");
    for server in [&one, &two, &two, &one, &one] {
        let name = server.client.get_model().await.expect("a model").stamp.expect("a stamp").fingerprint;
        let response = fleet.score(request(7, &name), TIMEOUT).await.expect("somebody serves it");
        assert_eq!(response.model.expect("a stamp").fingerprint, name);
    }
    let nobody = fleet.score(request(7, &"ab".repeat(32)), TIMEOUT).await.expect_err("nobody serves it");
    assert_eq!(nobody.code(), Some("FAILED_PRECONDITION"), "and that is said at once: {nobody}");
    // Without a name it is an ordinary mistake, and the first server's word is taken.
    let mut wrong = request(7, "");
    wrong.options = Some(wire::ScoreOptions { scale: wire::Scale::Calibrated.into(), ..Default::default() });
    assert_eq!(fleet.score(wrong, TIMEOUT).await.expect_err("no calibration").code(), Some("FAILED_PRECONDITION"));
    one.stopped().await;
    two.stopped().await;
}

#[test]
fn a_fleet_is_joined_restarted_and_swapped_under_load_and_loses_no_score() {
    // A longer run is the rehearsal's business.
    let rounds: usize = std::env::var("REHEARSAL_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    let (addresses, files, clock) = (ports(), Files::new(), Clock::system());
    let (all, config) = (addresses.join(","), files.config());

    // What each of the two models says where nobody disturbs it.
    files.want(&[0, 1, 2], STAGED);
    let alone = start(&addresses[0], &config);
    let (new, of_new) = undisturbed(&runtime, &addresses[0]);
    drop(alone);
    files.want(&[0, 1], STAGED);
    let mut servers: Vec<Server> = addresses[1..].iter().map(|address| start(address, &config)).collect();
    let (old, of_old) = undisturbed(&runtime, &addresses[1]);
    assert_ne!(of_old, of_new, "two models that can be told apart");

    // As a headless Service: it names the servers that are ready.
    let ready = Arc::new(Mutex::new(addresses[1..].to_vec()));
    let named = ready.clone();
    let find = move || std::future::ready(Ok(named.lock().expect("no panic").clone()));
    let fleet = runtime.block_on(Fleet::found_by(find, SEARCH, clock.clone())).expect("addresses");
    let load = Load::start(&runtime, fleet, BTreeMap::from([(old.clone(), of_old), (new.clone(), of_new)]));
    load.after_more(&runtime, 100);

    let early = load.instances.borrow().clone();
    let late = start(&addresses[0], &config);
    let since = clock.now();
    ready.lock().expect("no panic").push(addresses[0].clone());
    load.until_answered_by(&runtime, SERVERS);
    let joined = clock.now() - since;
    servers.insert(0, late);
    load.next_phase();
    load.after_more(&runtime, 400);

    load.next_phase();
    for _ in 0..rounds {
        for (server, address) in servers.iter_mut().zip(&addresses) {
            load.after_more(&runtime, 100);
            terminate(&server.0);
            assert_eq!(server.0.wait().expect("ended").code(), Some(0), "it drains and ends well");
            *server = start(address, &config);
        }
    }
    load.after_more(&runtime, 100);
    load.until_answered_by(&runtime, SERVERS * (rounds + 1));

    // Calls that die with a process are asked again elsewhere.
    load.next_phase();
    for killed in 0..rounds {
        load.after_more(&runtime, 100);
        servers[killed % SERVERS].0.kill().expect("killed");
        load.after_more(&runtime, 100);
        servers[killed % SERVERS] = start(&addresses[killed % SERVERS], &config);
    }
    load.until_answered_by(&runtime, SERVERS * (rounds + 1) + rounds);

    load.next_phase();
    files.want(&[0, 1, 2], STAGED);
    let staged = verb(&["reload"], &all);
    assert_eq!(staged.matches("(staged)").count(), SERVERS, "{staged}");
    assert!(verb(&["status"], &all).contains("4 servers, one model live"), "staging swaps nothing");
    let mut swaps = 0;
    for _ in 0..2 * rounds {
        for fingerprint in [&new, &old] {
            load.after_more(&runtime, 100);
            verb(&["activate", "--fingerprint", fingerprint], &all);
            swaps += 1;
        }
    }
    load.after_more(&runtime, 100);
    let seen = load.end(&runtime);
    servers.iter().for_each(|server| terminate(&server.0));

    let total: u64 = seen.answered.values().sum();
    let processes: BTreeSet<&str> = seen.answered.keys().map(|(_, instance)| instance.as_str()).collect();
    let restarts = rounds * SERVERS;
    println!(
        "{total} samples by {} processes, {restarts} restarts, {rounds} killed, {swaps} swaps: {} failed",
        processes.len(),
        seen.problems.len()
    );
    for (phase, latencies) in &seen.latencies {
        let mut sorted = latencies.clone();
        sorted.sort();
        let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share) as usize];
        println!("{}: {} samples, p50 {:?} p99 {:?} max {:?}", PHASES[*phase], sorted.len(), at(0.5), at(0.99), at(1.0));
    }
    let shares = seen.by_process(1);
    let newcomer: u64 = shares.iter().filter(|(instance, _)| !early.contains(**instance)).map(|(_, count)| count).sum();
    let share = newcomer as f64 / shares.values().sum::<u64>() as f64;
    println!("the late one answered {joined:?} after it was ready, and then had {:.1} % of all samples", 100.0 * share);
    println!("prompts by model, each scored by one: {:?}", seen.prompts.values().collect::<Vec<_>>());

    assert!(seen.problems.is_empty(), "{:#?}", seen.problems);
    assert_eq!(processes.len(), SERVERS * (rounds + 1) + rounds, "every process had its share, the late ones too");
    assert!((0.15..0.35).contains(&share), "a fourth of the samples for the fourth server, not {share}");
    assert_eq!(seen.prompts.keys().collect::<BTreeSet<_>>(), BTreeSet::from([&old, &new]), "both models have scored");
}
