//! A real server over a socket on this machine, with fakes for the model and the text.

use std::io::{Read, Write};
use std::sync::{Arc, Mutex, mpsc};

use tokio::sync::oneshot;

use super::*;
use crate::client::{Client, ClientError};
use crate::config::{Resolved, Sources};
use crate::registry::testing::{FakeModel, LOST, generation};
use crate::serve::Admin;
use crate::serve::tenants::{MAX_TENANTS, TENANT_HEADER};
use crate::wire::{self, prompt_group, sample::Input};

#[path = "proof_tests.rs"]
mod proof_tests;

struct Server {
    client: Client,
    readiness: Readiness,
    metrics: prometheus::Registry,
    in_flight: tokio::sync::watch::Receiver<usize>,
    stop: Option<oneshot::Sender<Stop>>,
    task: tokio::task::JoinHandle<Result<(), AppError>>,
    address: String,
    admin: Admin,
}

async fn start(settings: &[(&str, &str)], merged: Arc<FakeModel>, members: &[(&str, Arc<FakeModel>)]) -> Server {
    start_at(Clock::system(), settings, merged, members).await
}

async fn start_at(clock: Clock, settings: &[(&str, &str)], merged: Arc<FakeModel>, members: &[(&str, Arc<FakeModel>)]) -> Server {
    let flags = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let config = Resolved::new(Sources { flags, ..Sources::default() }).expect("settings").config;
    let app = App::new(&config, clock, "test".to_owned()).expect("app");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("free port");
    let address = listener.local_addr().expect("address").to_string();
    let loaded = generation(1, merged, members);
    let loading = app.load_in_background(Box::new(move |_, _| Ok(loaded)), Box::new(|_| {})).expect("thread");
    let admin = std::net::TcpListener::bind("127.0.0.1:0").expect("free port");
    let admin = Admin::start(admin, app.readiness().clone(), app.metrics().clone(), app.engine().clone()).expect("admin");
    let (stop, stopped) = oneshot::channel();
    let (readiness, metrics, in_flight) = (app.readiness().clone(), app.metrics().clone(), app.admission.in_flight());
    let task = tokio::spawn(async move { app.serve(listener, loading, async { stopped.await.unwrap_or(Stop::Interrupt) }).await });
    readiness.watch().wait_for(|&phase| phase == Phase::Ready).await.expect("ready");
    let client = Client::connect(&address).await.expect("connected");
    Server { client, readiness, metrics, in_flight, stop: Some(stop), task, address, admin }
}

impl Server {
    fn signal(&mut self, stop: Stop) {
        self.stop.take().expect("signalled once").send(stop).expect("server runs");
    }

    async fn stopped(mut self) {
        drop(self.client);
        drop(self.stop.take());
        self.task.await.expect("no panic").expect("clean stop");
    }

    /// What the admin port says of the watch.
    fn watch(&self) -> serde_json::Value {
        let mut stream = std::net::TcpStream::connect(self.admin.address()).expect("admin port");
        write!(stream, "GET /watch HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("asked");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a body");
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("content-type: application/json"), "{head}");
        serde_json::from_str(body).expect("JSON")
    }

    fn metric(&self, series: &str) -> f64 {
        let text = prometheus::TextEncoder::new().encode_to_string(&self.metrics.gather()).expect("text");
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("no series {series} in\n{text}"))
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, ClientError>) -> &'static str {
    result.expect_err("refused").code().expect("the server answers")
}

fn text(text: &str) -> wire::Sample {
    wire::Sample { input: Some(Input::Text(text.into())) }
}

fn score_of(texts: &[&str]) -> wire::ScoreRequest {
    wire::ScoreRequest { request_id: "r1".into(), samples: texts.iter().map(|t| text(t)).collect(), ..Default::default() }
}

fn group(prompt: &str, answers: &[&str]) -> wire::PromptGroup {
    let kind = |answer: &&str| wire::Completion { kind: Some(wire::completion::Kind::Text((*answer).into())) };
    wire::PromptGroup { prompt: Some(prompt_group::Prompt::Text(prompt.into())), completions: answers.iter().map(kind).collect() }
}

/// A model that waits inside its forward until the test lets it go, and says that it is there.
fn gated() -> (Arc<FakeModel>, mpsc::Sender<()>, tokio::sync::mpsc::UnboundedReceiver<()>) {
    let (release, gate) = mpsc::channel::<()>();
    let (inside, entered) = tokio::sync::mpsc::unbounded_channel();
    let gate = Mutex::new(gate);
    let model = FakeModel::hooked(1.0, move |_| {
        let _ = inside.send(());
        let _ = gate.lock().expect("one worker").recv();
    });
    (model, release, entered)
}

#[tokio::test]
async fn scores_samples_and_groups_and_names_the_model() {
    let model = FakeModel::new(1.0);
    let server = start(&[], model.clone(), &[]).await;
    let request = wire::ScoreRequest { groups: vec![group("p", &["a", "bc"])], ..score_of(&["x"]) };
    let response = server.client.score(request).await.expect("scored");
    assert_eq!(response.request_id, "r1");
    let expected = |text: &str| Some(model.score(&text.bytes().map(u32::from).collect::<Vec<_>>()));
    assert_eq!(response.scores[0].reward, expected("x"));
    let rewards: Vec<_> = response.groups[0].scores.iter().map(|score| score.reward).collect();
    assert_eq!(rewards, [expected("pa"), expected("pbc")]);
    let stamp = response.model.expect("stamp");
    let live = server.client.get_model().await.expect("model");
    assert_eq!(live.stamp, Some(stamp.clone()));
    assert_eq!((stamp.instance.as_str(), stamp.generation), ("test", 1));
    assert_eq!(server.metric("warm_serve_requests_total{code=\"OK\",rpc=\"Score\"}"), 1.0);
    assert_eq!(server.metric("warm_serve_in_flight_requests{rpc=\"Score\"}"), 0.0);
    server.stopped().await;
}

#[tokio::test]
async fn one_bad_sample_among_many_costs_itself_alone() {
    let server = start(&[], FakeModel::new(1.0), &[]).await;
    let long = "x".repeat(65);
    let mut texts = vec!["ok"; 512];
    texts[100] = &long;
    let scores = server.client.score(score_of(&texts)).await.expect("scored").scores;
    let failed: Vec<_> = scores.iter().enumerate().filter(|(_, score)| score.reward.is_none()).map(|(i, _)| i).collect();
    assert_eq!((scores.len(), failed), (512, vec![100]));
    let strict =
        wire::ScoreRequest { options: Some(wire::ScoreOptions { strict: true, ..Default::default() }), ..score_of(&["ok", &long]) };
    assert_eq!(code(server.client.score(strict).await), "INVALID_ARGUMENT");
    server.stopped().await;
}

#[tokio::test]
async fn compares_the_merged_model_with_its_members() {
    let members = [("rm-0", FakeModel::new(1.0)), ("rm-1", FakeModel::new(3.0))];
    let server = start(&[], FakeModel::new(2.0), &members).await;
    let request = wire::CompareRequest { groups: vec![group("", &["a", "b"])], ..Default::default() };
    let response = server.client.compare(request).await.expect("compared");
    assert_eq!(response.members, ["rm-0", "rm-1"]);
    let group = &response.groups[0];
    let a = &group.completions[0];
    // One token, 97: factors 2, 1 and 3.
    assert_eq!(a.merged.as_ref().and_then(|merged| merged.reward), Some(194.0));
    assert_eq!((a.member_rewards.as_slice(), a.mean, a.std, a.gap), (&[97.0, 291.0][..], Some(194.0), Some(97.0), Some(0.0)));
    assert_eq!((group.best_by_merged, group.votes.as_slice(), group.kendall_tau), (Some(1), &[0, 2][..], Some(1.0)));
    let unknown = wire::CompareRequest { samples: vec![text("x")], members: vec!["rm-9".into()], ..Default::default() };
    assert_eq!(code(server.client.compare(unknown).await), "NOT_FOUND");
    server.stopped().await;
}

#[tokio::test]
async fn a_comparison_without_resident_members_is_a_failed_precondition() {
    let server = start(&[], FakeModel::new(2.0), &[]).await;
    let request = wire::CompareRequest { samples: vec![text("x")], ..Default::default() };
    assert_eq!(code(server.client.compare(request).await), "FAILED_PRECONDITION");
    server.stopped().await;
}

#[tokio::test]
async fn bad_requests_name_their_fields() {
    let server = start(&[("message.max_decode", "10kB")], FakeModel::new(1.0), &[]).await;
    match server.client.score(wire::ScoreRequest::default()).await {
        Err(ClientError::Status { code: "INVALID_ARGUMENT", violations, .. }) => assert_eq!(violations[0].0, "samples"),
        other => panic!("{other:?}"),
    }
    let huge = "x".repeat(20_000);
    match server.client.score(score_of(&[&huge])).await {
        Err(ClientError::Status { code: "OUT_OF_RANGE", message, .. }) => assert!(message.contains("10000"), "names the limit: {message}"),
        other => panic!("{other:?}"),
    }
    let pinned =
        wire::ScoreRequest { options: Some(wire::ScoreOptions { fingerprint: "ab".repeat(32), ..Default::default() }), ..score_of(&["x"]) };
    assert_eq!(code(server.client.score(pinned).await), "FAILED_PRECONDITION");
    server.stopped().await;
}

#[tokio::test]
async fn a_deadline_answers_deadline_exceeded_also_while_queued() {
    let (model, release, mut entered) = gated();
    // By a clock in the test's hand, because on a busy machine the client's own timer may win by milliseconds.
    let clock = Clock::manual();
    let mut server = start_at(clock.clone(), &[], model, &[]).await;
    let busy = tokio::spawn({
        let client = server.client.clone();
        async move { client.score(score_of(&["busy"])).await }
    });
    entered.recv().await.expect("inside the forward");
    let queued = tokio::spawn({
        let client = server.client.clone();
        async move { client.score_within(score_of(&["queued"]), Duration::from_secs(3600)).await }
    });
    server.in_flight.wait_for(|&requests| requests == 2).await.expect("server runs");
    clock.advance(Duration::from_secs(3600));
    assert_eq!(code(queued.await.expect("no panic")), "DEADLINE_EXCEEDED");
    drop(release);
    busy.await.expect("no panic").expect("the busy one is answered");
    server.stopped().await;
}

#[tokio::test]
async fn beyond_the_bound_requests_are_shed_with_a_time_to_come_back() {
    let (model, release, mut entered) = gated();
    let server = start(&[("admission.max_requests", "1"), ("admission.retry_after", "250ms")], model, &[]).await;
    let busy = tokio::spawn({
        let client = server.client.clone();
        async move { client.score(score_of(&["busy"])).await }
    });
    entered.recv().await.expect("inside the forward");
    match server.client.score(score_of(&["more"])).await {
        Err(ClientError::Status { code: "RESOURCE_EXHAUSTED", retry_after, .. }) => {
            let around = Duration::from_millis(187)..Duration::from_millis(313);
            assert!(retry_after.is_some_and(|after| around.contains(&after)), "{retry_after:?}");
        }
        other => panic!("{other:?}"),
    }
    assert!(server.client.is_serving("").await.expect("health answers under load"));
    assert!(server.client.get_model().await.is_ok(), "operators come through");
    assert_eq!(server.metric("warm_serve_shed_total{reason=\"requests\"}"), 1.0);
    drop(release);
    busy.await.expect("no panic").expect("answered");
    server.stopped().await;
}

#[tokio::test]
async fn a_stop_finishes_what_is_in_flight_and_refuses_what_is_new() {
    let (model, release, mut entered) = gated();
    let mut server = start(&[("drain.delay", "0s")], model, &[]).await;
    let second = Client::connect(&server.address).await.expect("connected");
    // An open watch must not hold up the drain.
    let mut watch = second.health().watch(tonic_health::pb::HealthCheckRequest::default()).await.expect("watch").into_inner();
    let accepted = tokio::spawn({
        let client = server.client.clone();
        async move { client.score(score_of(&["accepted"])).await }
    });
    entered.recv().await.expect("inside the forward");
    server.signal(Stop::Terminate);
    server.readiness.watch().wait_for(|&phase| phase == Phase::Stopping).await.expect("stopping");
    while let Ok(Some(_)) = watch.message().await {}
    // The connection may be closed already, which the client's transport tells in its own words.
    second.score(score_of(&["late"])).await.expect_err("draining");
    drop(release);
    let scores = accepted.await.expect("no panic").expect("what was accepted is answered").scores;
    assert_eq!(scores.len(), 1);
    server.stopped().await;
}

#[tokio::test]
async fn what_never_ends_is_cut_at_the_drain_deadline() {
    let (model, release, mut entered) = gated();
    let mut server = start(&[("drain.delay", "0s"), ("drain.deadline", "20ms")], model, &[]).await;
    let stuck = tokio::spawn({
        let client = server.client.clone();
        async move { client.score(score_of(&["stuck"])).await }
    });
    entered.recv().await.expect("inside the forward");
    server.signal(Stop::Interrupt);
    server.task.await.expect("no panic").expect("stops all the same");
    drop(release);
    stuck.abort();
}

#[tokio::test]
async fn before_a_model_is_loaded_health_says_no_and_scoring_is_unavailable() {
    let config = Resolved::new(Sources::default()).expect("defaults").config;
    let app = App::new(&config, Clock::system(), "test".to_owned()).expect("app");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("free port");
    let address = listener.local_addr().expect("address").to_string();
    let (stop, stopped) = oneshot::channel();
    let task =
        tokio::spawn(async move { app.serve(listener, std::future::pending(), async { stopped.await.unwrap_or(Stop::Interrupt) }).await });
    let client = Client::connect(&address).await.expect("connected");
    assert!(!client.is_serving("warm.v1.RewardService").await.expect("answer"));
    assert_eq!(code(client.score(score_of(&["x"])).await), "UNAVAILABLE");
    stop.send(Stop::Interrupt).expect("server runs");
    task.await.expect("no panic").expect("a stop during the load is clean");
}

#[tokio::test]
async fn a_model_that_cannot_be_loaded_ends_the_server_with_its_reason() {
    let config = Resolved::new(Sources::default()).expect("defaults").config;
    let app = App::new(&config, Clock::system(), "test".to_owned()).expect("app");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("free port");
    let loading = app.load_in_background(Box::new(|_, _| Err("no such folder".to_owned())), Box::new(|_| {})).expect("thread");
    let error = app.serve(listener, loading, std::future::pending()).await.expect_err("load fails");
    assert_eq!(error.to_string(), "the model cannot be loaded: no such folder");
}

fn ask(id: &str, texts: &[&str]) -> wire::ScoreRequest {
    wire::ScoreRequest { request_id: id.into(), ..score_of(texts) }
}

#[tokio::test]
async fn a_stream_answers_each_request_when_it_is_finished_and_errors_are_answers() {
    let model = FakeModel::new(1.0);
    let server = start(&[], model.clone(), &[]).await;
    let (requests, mut answers) = server.client.score_stream().await.expect("a stream");
    assert!(requests.score(ask("fine", &["ab"])).await);
    assert!(requests.score(ask("empty", &[])).await);
    assert!(requests.score(wire::ScoreRequest { groups: vec![group("p", &["q"])], ..ask("", &["x"]) }).await);
    drop(requests);
    let mut found = std::collections::HashMap::new();
    while let Some(answer) = answers.next().await.expect("an open stream") {
        assert!(found.insert(answer.request_id.clone(), answer).is_none(), "answered twice");
    }
    assert_eq!((found.len(), found["fine"].scores[0].reward), (3, Some(model.score(&[97, 98]))));
    let error = found["empty"].error.as_ref().expect("nothing to score");
    assert_eq!((error.code, error.violations[0].field.as_str()), (3, "samples"));
    assert!(found[""].error.is_none() && found[""].scores.len() == 1 && found[""].groups[0].scores.len() == 1);
    assert_eq!(server.metric("warm_serve_requests_total{code=\"OK\",rpc=\"ScoreStream.request\"}"), 2.0);
    assert_eq!(server.metric("warm_serve_requests_total{code=\"INVALID_ARGUMENT\",rpc=\"ScoreStream.request\"}"), 1.0);
    assert_eq!(*server.in_flight.borrow(), 0);
    server.stopped().await;
}

#[tokio::test]
async fn a_request_of_a_stream_can_be_withdrawn_and_has_a_time_of_its_own() {
    let (model, release, mut entered) = gated();
    let clock = Clock::manual();
    let server = start_at(clock.clone(), &[], model, &[]).await;
    let (requests, mut answers) = server.client.score_stream().await.expect("a stream");
    assert!(requests.score(ask("busy", &["busy"])).await);
    entered.recv().await.expect("inside the forward");
    let options = Some(wire::ScoreOptions { timeout_ms: 50, ..Default::default() });
    assert!(requests.score(wire::ScoreRequest { options, ..ask("late", &["late"]) }).await);
    assert!(requests.score(ask("unwanted", &["unwanted"])).await);
    assert!(requests.score(ask("unwanted", &["again"])).await);
    let mut next = async || {
        let answer = answers.next().await.expect("an open stream").expect("an answer");
        (answer.request_id, answer.error.map_or(0, |error| error.code))
    };
    assert_eq!(next().await, ("unwanted".to_owned(), 6), "the name is in use");
    assert!(requests.cancel("unwanted").await && requests.cancel("never asked").await);
    assert_eq!(next().await, ("unwanted".to_owned(), 1));
    clock.advance(Duration::from_millis(50));
    assert_eq!(next().await, ("late".to_owned(), 4));
    drop(release);
    assert_eq!(next().await, ("busy".to_owned(), 0));
    server.stopped().await;
}

#[tokio::test]
async fn a_stream_listens_while_its_answers_are_not_read() {
    let (model, release, mut entered) = gated();
    let mut server = start(&[("stream.window", "8")], model, &[]).await;
    let (requests, mut answers) = server.client.score_stream().await.expect("a stream");
    // Answers of a megabyte, which do not fit between the two ends while nobody reads them.
    let options = Some(wire::ScoreOptions { details: true, truncation: wire::Truncation::Left.into(), ..Default::default() });
    let large = |id: &str| wire::ScoreRequest { options: options.clone(), ..ask(id, &vec!["x".repeat(64).as_str(); 4096]) };
    for id in ["a", "b", "c", "d", "e", "f"] {
        assert!(requests.score(large(id)).await);
    }
    // Packs of these; what comes after them stays on the device until it is let go.
    let samples = |server: &Server| server.metric("warm_scorer_samples_total");
    while samples(&server) < 6.0 * 4096.0 {
        if entered.try_recv().is_ok() {
            release.send(()).expect("a pack waits for it");
        }
        tokio::task::yield_now().await;
    }
    assert!(requests.score(ask("busy", &["busy"])).await && requests.score(ask("unwanted", &["unwanted"])).await);
    assert!(requests.cancel("unwanted").await);
    // Its cancellation is seen although no answer has been read.
    while server.metric("warm_serve_requests_total{code=\"CANCELLED\",rpc=\"ScoreStream.request\"}") < 1.0 {
        tokio::task::yield_now().await;
    }
    drop((release, requests));
    let mut seen = std::collections::HashSet::new();
    while let Some(answer) = answers.next().await.expect("an open stream") {
        assert!(seen.insert(answer.request_id));
    }
    assert_eq!(seen.len(), 8);
    server.in_flight.wait_for(|&requests| requests == 0).await.expect("all permits are back");
    server.stopped().await;
}

#[tokio::test]
async fn a_stream_is_not_read_beyond_its_window() {
    let (model, release, mut entered) = gated();
    let mut server = start(&[("stream.window", "2")], model, &[]).await;
    let (requests, mut answers) = server.client.score_stream().await.expect("a stream");
    let asking = tokio::spawn(async move {
        for i in 0..40 {
            assert!(requests.score(ask(&i.to_string(), &["x"])).await);
        }
    });
    entered.recv().await.expect("inside the forward");
    // The stream itself and two requests.
    server.in_flight.wait_for(|&requests| requests == 3).await.expect("server runs");
    drop(release);
    let mut seen = std::collections::HashSet::new();
    while let Some(answer) = answers.next().await.expect("an open stream") {
        assert!(answer.error.is_none() && seen.insert(answer.request_id));
        // Two answers more may be on their way out.
        assert!(*server.in_flight.borrow() <= 5);
    }
    assert_eq!(seen.len(), 40);
    asking.await.expect("no panic");
    server.stopped().await;
}

#[tokio::test]
async fn a_full_server_refuses_on_the_stream_and_one_that_stops_ends_it() {
    let (model, release, mut entered) = gated();
    let mut server = start(&[("admission.max_requests", "2"), ("admission.retry_after", "250ms"), ("drain.delay", "0s")], model, &[]).await;
    let (requests, mut answers) = server.client.score_stream().await.expect("a stream");
    assert!(requests.score(ask("busy", &["busy"])).await);
    entered.recv().await.expect("inside the forward");
    assert!(requests.score(ask("more", &["more"])).await);
    let refused = answers.next().await.expect("an open stream").expect("an answer");
    let error = refused.error.expect("no room");
    assert_eq!((refused.request_id.as_str(), error.code), ("more", 8));
    assert!((187..=313).contains(&error.retry_after_ms), "{error:?}");
    server.signal(Stop::Interrupt);
    server.readiness.watch().wait_for(|&phase| phase == Phase::Stopping).await.expect("stopping");
    drop(release);
    let last = answers.next().await.expect("an open stream").expect("what was read is answered");
    assert_eq!((last.request_id.as_str(), last.scores.len()), ("busy", 1));
    assert!(answers.next().await.expect("a clean end").is_none());
    server.stopped().await;
}

#[tokio::test]
async fn a_caller_that_leaves_its_stream_withdraws_what_it_asked_for() {
    let (model, release, mut entered) = gated();
    // A pack has one sample.
    let mut server = start(&[("max_pack_tokens", "1")], model, &[]).await;
    let (requests, answers) = server.client.score_stream().await.expect("a stream");
    for id in ["a", "b", "c"] {
        assert!(requests.score(ask(id, &[id])).await);
    }
    entered.recv().await.expect("inside the forward");
    drop((requests, answers));
    server.in_flight.wait_for(|&requests| requests == 1).await.expect("what no device works at is withdrawn");
    drop(release);
    server.in_flight.wait_for(|&requests| requests == 0).await.expect("all permits are back");
    server.stopped().await;
    assert!(entered.try_recv().is_err(), "nothing else was run");
}

#[tokio::test]
async fn messages_of_512_samples_of_4096_tokens_come_through_also_compressed() {
    use tonic::codec::CompressionEncoding::{Gzip, Zstd};
    let model = FakeModel::new(1.0);
    let server = start(&[], model.clone(), &[]).await;
    let sample = |i: u32| wire::Sample {
        input: Some(Input::Tokens(wire::TokenIds { ids: (0..4096).map(|j| 100_000 + (i + j) % 50_000).collect() })),
    };
    let options = wire::ScoreOptions { truncation: wire::Truncation::Left.into(), details: true, ..Default::default() };
    let request = wire::ScoreRequest { samples: (0..512).map(sample).collect(), options: Some(options), ..Default::default() };
    let plain = server.client.rewards().score(request.clone()).await.expect("plain").into_inner();
    let zstd = server.client.rewards().send_compressed(Zstd).score(request.clone()).await.expect("zstd").into_inner();
    let gzip = server.client.rewards().send_compressed(Gzip).score(request).await.expect("gzip").into_inner();
    assert_eq!((plain.scores.len(), &plain.scores), (512, &zstd.scores));
    assert_eq!(plain.scores, gzip.scores);
    server.stopped().await;
}

#[tokio::test]
async fn tenants_are_told_apart_by_their_metadata() {
    // One pack at a time of one sample; a flood of one tenant is queued before the other's request. The packs themselves tell
    // the order, because an answer may reach its caller many packs later on a busy machine.
    let (release, gate) = mpsc::channel::<()>();
    let (inside, mut entered) = tokio::sync::mpsc::unbounded_channel();
    let gate = Mutex::new(gate);
    let model = FakeModel::hooked(1.0, move |pack| {
        let _ = inside.send(pack[0][0]);
        let _ = gate.lock().expect("one worker").recv();
    });
    let server = start(&[("max_pack_tokens", "64")], model, &[]).await;
    let ask = |tenant: &'static str, texts: Vec<String>| {
        let client = server.client.clone();
        tokio::spawn(async move {
            let samples = texts.iter().map(|t| text(t)).collect();
            let mut request = tonic::Request::new(wire::ScoreRequest { samples, ..Default::default() });
            request.metadata_mut().insert(TENANT_HEADER, tenant.parse().expect("a name"));
            client.rewards().score(request).await.expect("scored");
        })
    };
    let queued = |samples: usize| {
        let scorer = server.metrics.clone();
        async move {
            let depth = || {
                let text = prometheus::TextEncoder::new().encode_to_string(&scorer.gather()).expect("text");
                text.lines().find_map(|line| line.strip_prefix("warm_scorer_queue_samples ")?.parse().ok()).unwrap_or(0usize)
            };
            while depth() != samples {
                tokio::task::yield_now().await;
            }
        }
    };
    let flood = ask("flood", (0..40).map(|i| format!("{i:064}")).collect());
    entered.recv().await.expect("inside the first forward");
    // One more pack is collated while the first one runs.
    queued(38).await;
    let small = ask("small", vec!["x".repeat(64)]);
    queued(39).await;
    drop(release);
    small.await.expect("no panic");
    flood.await.expect("no panic");
    let mut before = 1;
    while entered.recv().await.expect("the small request was scored") != u32::from(b'x') {
        before += 1;
    }
    assert!(before <= 5, "the small request came after {before} packs of the flood");
    server.stopped().await;
}

/// A call of a tenant: one prompt and two answers.
async fn ask_as(server: &Server, tenant: &str) {
    let mut request = tonic::Request::new(wire::ScoreRequest { groups: vec![group("p", &["a", "bc"])], ..Default::default() });
    request.metadata_mut().insert(TENANT_HEADER, tenant.parse().expect("a name"));
    server.client.rewards().score(request).await.expect("scored");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_watch_is_told_over_http_before_the_first_call_and_tenant_by_tenant() {
    let server = start(&[("tenants", "team-a,team-b")], FakeModel::new(1.0), &[]).await;
    let nothing = server.watch();
    assert_eq!((&nothing["window_s"], &nothing["baseline_s"], &nothing["shadow_share"]), (&600.into(), &3600.into(), &0.01.into()));
    let names = |watch: &serde_json::Value| watch["tenants"].as_object().expect("tenants").keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&nothing), ["none", "team-a", "team-b"]);
    let figures = nothing["figures"].as_object().expect("meanings");
    for run in nothing["tenants"].as_object().expect("tenants").values() {
        assert!(run["generation"].is_null() && run["began_unix_s"].is_null() && run["first_hour_is_over"] == false, "{run}");
        for when in ["now", "first_hour"] {
            let found = run[when].as_object().expect("figures");
            assert!(found.keys().eq(figures.keys()), "every figure has a meaning: {run}");
            // What nobody has counted is nothing, and what nothing defines is null; never NaN, which JSON does not have.
            assert!(found.iter().all(|(name, value)| if name.ends_with("samples") { value == 0.0 } else { value.is_null() }), "{run}");
            for (sizes, bounds) in [("rewards", "reward_bounds"), ("lengths", "length_bounds")] {
                let counts = run[sizes][when].as_array().expect("counts");
                assert_eq!(counts.len(), nothing[bounds].as_array().expect("bounds").len() + 1);
                assert!(counts.iter().all(|count| *count == 0), "{run}");
            }
        }
    }

    for tenant in ["team-a", "team-a", "stranger"] {
        ask_as(&server, tenant).await;
    }
    let watch = server.watch();
    assert_eq!(names(&watch), ["none", "other", "team-a", "team-b"]);
    let samples = |tenant: &str| watch["tenants"][tenant]["now"]["samples"].as_f64();
    assert_eq!(["none", "other", "team-a", "team-b"].map(samples), [0.0, 2.0, 4.0, 0.0].map(Some));
    assert_eq!((&watch["tenants"]["team-a"]["generation"], &watch["tenants"]["team-b"]["generation"]), (&1.into(), &().into()));
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_most_thirty_two_tenants_have_runs_of_their_own() {
    let server = start(&[], FakeModel::new(1.0), &[]).await;
    for i in 0..40 {
        ask_as(&server, &format!("team-{i:02}")).await;
    }
    let watch = server.watch();
    let runs = watch["tenants"].as_object().expect("tenants");
    assert_eq!(runs.len(), MAX_TENANTS + 2, "thirty-two, none and other: {:?}", runs.keys());
    assert_eq!(runs["other"]["now"]["samples"], 16.0, "the eight that came last, together");
    assert_eq!((server.metric("warm_watch_reward_count{tenant=\"team-31\"}"), runs.contains_key("team-32")), (2.0, false));
    let wrong = (0..33).map(|i| format!("t{i}")).collect::<Vec<_>>().join(",");
    let errors = Resolved::new(Sources { flags: vec![("tenants".to_owned(), wrong)], ..Sources::default() }).expect_err("too many");
    assert!(errors.to_string().contains("32"), "{errors}");
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_shadow_what_a_server_answers_once_it_knows_where_they_lie() {
    let members = [("rm-0", FakeModel::new(2.0)), ("rm-1", FakeModel::new(-4.0))];
    let settings = [("shadow.share", "1"), ("shadow.max_tokens_per_second", "1000000")];
    let server = start(&settings, FakeModel::new(1.0), &members).await;
    let became = |watch: &serde_json::Value, outcome: &str| watch["shadow_samples"][outcome].as_u64().expect("a count");
    let (mut asked, mut watch) = (0, server.watch());
    // 256 samples of each model tell where its rewards lie; until then nothing is said of their differences.
    while became(&watch, "scored") < 4 {
        ask_as(&server, "team").await;
        asked += 2;
        watch = server.watch();
        while watch["shadow_samples"].as_object().expect("counts").values().filter_map(serde_json::Value::as_u64).sum::<u64>() < asked {
            tokio::task::yield_now().await;
            watch = server.watch();
        }
    }
    assert!(became(&watch, "uncentered") >= 254, "{watch}");
    let now = &watch["tenants"]["team"]["now"];
    assert_eq!(now["shadow_samples"].as_f64().map(|samples| samples as u64), Some(became(&watch, "scored")), "{now}");
    // The members' mean falls where the merged model rises, by twice as much.
    assert_eq!((&now["rank_agreement"], &now["sign_disagreement_ratio"]), (&(-1.0).into(), &0.5.into()), "{now}");
    assert!(now["gap"].as_f64().is_some_and(|gap| gap > 0.0) && now["member_std"].as_f64().is_some_and(|std| std > 0.0), "{now}");
    server.stopped().await;
}

#[tokio::test]
async fn packs_of_automatic_size_are_told_by_get_model_and_hold_what_there_is_room_for() {
    let server = start(&[("max_pack_tokens", "auto"), ("device", "cpu")], FakeModel::new(1.0), &[]).await;
    let told = server.client.get_model().await.expect("a model").max_pack_tokens;
    // More is of no use on the CPU; how much this process takes meanwhile is other tests' business, too.
    assert!((256..=8192).contains(&told) && told % 256 == 0, "{told}");
    assert_eq!(server.metric("warm_scorer_max_pack_tokens"), f64::from(told));
    server.stopped().await;
}

#[tokio::test]
async fn a_lost_device_ends_the_server_with_an_error() {
    let mut server = start(&[], FakeModel::new(1.0), &[]).await;
    let tokens = |ids: &[u32]| wire::ScoreRequest {
        samples: vec![wire::Sample { input: Some(Input::Tokens(wire::TokenIds { ids: ids.to_vec() })) }],
        ..Default::default()
    };
    server.client.score(tokens(&[1, 2])).await.expect("scored");
    let refused = server.client.score(tokens(&[LOST])).await;
    assert_eq!(code(refused), "INTERNAL");
    let ended = server.task.await.expect("no panic");
    assert!(matches!(ended, Err(AppError::DeviceLost)), "{ended:?}");
    assert_eq!(*server.readiness.watch().borrow(), Phase::Stopping);
    // Nobody asked it to stop.
    assert!(server.stop.take().is_some_and(|stop| stop.is_closed()));
}
