//! A fleet on one machine: four processes behind a client that takes turns, one sample a request, while all of them are
//! restarted one by one. `deploy/rehearse.sh` runs it for longer and prints its figures.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use warm::client::{Client, Fleet};
use warm::clock::Clock;
use warm::wire::{self, sample::Input};

use super::binary::{serve_at, terminate};

const SERVERS: usize = 4;
const CALLERS: usize = 8;
const TIMEOUT: Duration = Duration::from_secs(30);

/// Ports that were free a moment ago, all of them different. A server that restarts needs the one it had.
fn ports() -> Vec<String> {
    let held: Vec<_> = (0..SERVERS).map(|_| std::net::TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
    held.iter().map(|listener| listener.local_addr().expect("an address").to_string()).collect()
}

/// Starts a server and waits until it is ready; its log is read to its end elsewhere, so that it never blocks on it.
fn start(address: &str) -> Child {
    let mut server = serve_at(address, &["--drain-delay", "300ms", "--threads", "1"], super::members());
    let mut log = BufReader::new(server.stderr.take().expect("piped"));
    let mut line = String::new();
    while !line.contains("ready") {
        line.clear();
        assert!(log.read_line(&mut line).expect("log") > 0, "{address}: the log ended before it was ready");
    }
    std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    server
}

fn request(number: u64) -> wire::ScoreRequest {
    let ids = (0..10 + number % 40).map(|k| 10 + ((number * 31 + k * 7) % 300) as u32).collect();
    let sample = wire::Sample { input: Some(Input::Tokens(wire::TokenIds { ids })) };
    wire::ScoreRequest { request_id: number.to_string(), samples: vec![sample], ..Default::default() }
}

#[test]
fn a_rolling_restart_under_load_loses_no_score() {
    // A longer run is the rehearsal's business.
    let rounds: usize = std::env::var("REHEARSAL_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1);
    let addresses = ports();
    let mut servers: Vec<Child> = addresses.iter().map(|address| start(address)).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    // What each sample's score is, by a server that nobody disturbs.
    let expected: Arc<Vec<f32>> = Arc::new(runtime.block_on(async {
        let client = Client::connect(&addresses[0]).await.expect("connected");
        let mut expected = Vec::new();
        for number in 0..200 {
            let response = client.score(request(number)).await.expect("scored");
            expected.push(response.scores[0].reward.expect("a score"));
        }
        expected
    }));
    let fleet = Arc::new(runtime.block_on(async { Fleet::new(&addresses, Clock::system()).expect("addresses") }));
    let (stop, number) = (Arc::new(AtomicBool::new(false)), Arc::new(watch::Sender::new(0u64)));
    let instances = Arc::new(watch::Sender::new(BTreeSet::<String>::new()));
    // Some work is done between two restarts.
    let after_more = |samples: u64| {
        let target = *number.borrow() + samples;
        let mut seen = number.subscribe();
        runtime.block_on(async { drop(seen.wait_for(|&number| number >= target).await.expect("callers go on")) });
    };
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| {
            let (fleet, stop, number, expected) = (fleet.clone(), stop.clone(), number.clone(), expected.clone());
            let instances = instances.clone();
            runtime.spawn(async move {
                let (mut answered, mut problems, mut fingerprints) =
                    (BTreeMap::<String, u64>::new(), Vec::new(), BTreeMap::<String, u64>::new());
                let mut latencies = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let mut mine = 0;
                    number.send_modify(|number| mine = std::mem::replace(number, *number + 1));
                    let asked = Clock::system().now();
                    match fleet.score(request(mine % 200), TIMEOUT).await {
                        Ok(response) => {
                            latencies.push(Clock::system().now() - asked);
                            let stamp = response.model.unwrap_or_default();
                            instances.send_if_modified(|instances| instances.insert(stamp.instance.clone()));
                            *answered.entry(stamp.instance).or_default() += 1;
                            *fingerprints.entry(stamp.fingerprint).or_default() += 1;
                            if response.scores[0].reward != Some(expected[(mine % 200) as usize]) {
                                problems.push(format!("sample {mine}: {:?}", response.scores[0]));
                            }
                        }
                        Err(error) => problems.push(format!("sample {mine}: {error}")),
                    }
                }
                (answered, problems, fingerprints, latencies)
            })
        })
        .collect();
    for _ in 0..rounds {
        for (server, address) in servers.iter_mut().zip(&addresses) {
            after_more(200);
            terminate(server);
            assert_eq!(server.wait().expect("ended").code(), Some(0), "it drains and ends well");
            *server = start(address);
        }
    }
    after_more(400);
    // A server that came back is tried again after a while, which on a busy machine may be later than that.
    runtime.block_on(async {
        let (clock, mut seen) = (Clock::system(), instances.subscribe());
        tokio::select! {
            _ = seen.wait_for(|instances| instances.len() == SERVERS * (rounds + 1)) => {}
            () = clock.sleep_until(clock.now() + 2 * TIMEOUT) => {}
        }
    });
    stop.store(true, Ordering::Relaxed);
    let (mut answered, mut problems, mut fingerprints, mut latencies) = (BTreeMap::new(), Vec::new(), BTreeMap::new(), Vec::new());
    for caller in callers {
        let (by_instance, wrong, by_fingerprint, took) = runtime.block_on(caller).expect("no panic");
        by_instance.into_iter().for_each(|(instance, count)| *answered.entry(instance).or_insert(0) += count);
        by_fingerprint.into_iter().for_each(|(fingerprint, count)| *fingerprints.entry(fingerprint).or_insert(0) += count);
        problems.extend(wrong);
        latencies.extend(took);
    }
    servers.iter().for_each(terminate);
    servers.iter_mut().for_each(|server| drop(server.wait()));
    latencies.sort();
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
    let total: u64 = answered.values().sum();
    println!("{total} samples by {} processes over {} restarts: {} failed", answered.len(), rounds * SERVERS, problems.len());
    println!("latency p50 {:?} p99 {:?} max {:?}", at(0.5), at(0.99), at(1.0));
    println!("each process: {:?}", answered.values().collect::<Vec<_>>());
    assert!(problems.is_empty(), "{problems:#?}");
    assert_eq!(fingerprints.len(), 1, "one recipe is one fingerprint, on every machine: {fingerprints:?}");
    assert_eq!(answered.len(), SERVERS * (rounds + 1), "every process had its share, the late ones too: {answered:?}");
}
