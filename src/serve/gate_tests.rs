use std::convert::Infallible;

use prometheus::Registry;
use proptest::prelude::*;

use std::sync::Mutex;

use tonic::Code;

use super::*;
use crate::registry::{Problem, Recent};
use crate::scorer::{AdmissionOptions, Permit, ScorerMetrics};
use crate::serve::calls::{Answered, CallFacts, CallLogOptions};
use crate::serve::tenants::{TENANT_HEADER, Tenants};
use crate::serve::{ServeMetrics, status};

struct Fixture {
    registry: Registry,
    clock: Clock,
    admission: Admission,
    recent: Recent,
    layer: GateLayer,
}

fn fixture(max_requests: usize) -> Fixture {
    logging(max_requests, CallLogOptions { successes: 1.0, content: false })
}

fn logging(max_requests: usize, log: CallLogOptions) -> Fixture {
    with(AdmissionOptions { max_requests, ..Default::default() }, log)
}

fn bounded(bounds: AdmissionOptions) -> Fixture {
    with(bounds, CallLogOptions { successes: 1.0, content: false })
}

fn with(bounds: AdmissionOptions, log: CallLogOptions) -> Fixture {
    let registry = Registry::new();
    let clock = Clock::manual();
    let scorer = ScorerMetrics::register(&registry).expect("fresh registry");
    let admission = Admission::new(bounds, scorer);
    let metrics = ServeMetrics::register(&registry).expect("fresh registry");
    let recent = Recent::default();
    let calls = CallBook::new(clock.clone(), metrics, recent.clone(), Arc::new(Tenants::new(&[])), log);
    let options = GateOptions { clock: clock.clone(), admission: admission.clone(), calls, assumed_bytes: 1000, max_bytes: 2000 };
    Fixture { registry, clock, admission, recent, layer: GateLayer::new(options) }
}

impl Fixture {
    fn count(&self, rpc: &str, code: &str) -> f64 {
        self.metric(&format!("warm_serve_requests_total{{code=\"{code}\",rpc=\"{rpc}\"}} "))
    }

    fn metric(&self, series: &str) -> f64 {
        let text = prometheus::TextEncoder::new().encode_to_string(&self.registry.gather()).expect("text");
        text.lines().find_map(|line| line.strip_prefix(series)).expect("series present").parse().expect("number")
    }
}

fn request(path: &str, timeout: Option<&str>) -> http::Request<Body> {
    let mut request = http::Request::builder().uri(path);
    if let Some(timeout) = timeout {
        request = request.header("grpc-timeout", timeout);
    }
    request.body(Body::empty()).expect("valid request")
}

fn code(response: &http::Response<Body>) -> Code {
    response.headers().get("grpc-status").map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
}

const SCORE: &str = "/warm.v1.RewardService/Score";

#[tokio::test]
async fn a_call_that_never_ends_is_answered_before_its_own_deadline() {
    let fixture = fixture(1);
    let never = tower::service_fn(|_| std::future::pending::<Result<http::Response<Body>, Infallible>>());
    let mut gate = fixture.layer.layer(never);
    let answer = gate.call(request(SCORE, Some("100m")));
    let late = async {
        // 10 ms before the caller's timer, and not before that.
        fixture.clock.advance(Duration::from_millis(89));
        tokio::task::yield_now().await;
        assert_eq!(fixture.count("Score", "DEADLINE_EXCEEDED"), 0.0);
        fixture.clock.advance(Duration::from_millis(1));
    };
    let (response, ()) = tokio::join!(answer, late);
    assert_eq!(code(&response.expect("infallible")), Code::DeadlineExceeded);
    assert_eq!(fixture.count("Score", "DEADLINE_EXCEEDED"), 1.0);
    assert_eq!(*fixture.admission.in_flight().borrow(), 0, "the permit went with the call");
}

#[tokio::test]
async fn the_deadline_and_the_permit_travel_with_the_request() {
    let fixture = fixture(1);
    let start = fixture.clock.now();
    let look = tower::service_fn(move |request: http::Request<Body>| async move {
        let deadline = request.extensions().get::<Deadline>().copied();
        assert_eq!(deadline, Some(Deadline(start + Duration::from_millis(1990))));
        assert!(request.extensions().get::<Permit>().is_some());
        Ok::<_, Infallible>(http::Response::new(Body::empty()))
    });
    let response = fixture.layer.layer(look).call(request(SCORE, Some("2S"))).await.expect("infallible");
    assert_eq!(code(&response), Code::Ok);
    assert_eq!(fixture.count("Score", "OK"), 1.0);
}

#[tokio::test]
async fn a_call_beyond_the_bound_is_refused_with_a_time_to_come_back() {
    let fixture = fixture(1);
    let _held = fixture.admission.admit(1).expect("first");
    let unreachable = tower::service_fn(|request: http::Request<Body>| async move {
        assert_ne!(request.uri().path(), SCORE, "refused before the service is called");
        Ok::<_, Infallible>(http::Response::new(Body::empty()))
    });
    let mut gate = fixture.layer.layer(unreachable);
    let response = gate.call(request(SCORE, None)).await.expect("infallible");
    assert_eq!(code(&response), Code::ResourceExhausted);
    assert!(response.headers().contains_key("grpc-status-details-bin"), "RetryInfo");
    for path in ["/grpc.health.v1.Health/Check", "/warm.v1.ModelService/GetModel"] {
        let response = gate.call(request(path, None)).await.expect("infallible");
        assert_eq!(code(&response), Code::Ok, "{path}");
    }
}

#[tokio::test]
async fn a_draining_server_refuses_new_calls_as_unavailable() {
    let fixture = fixture(1);
    fixture.admission.drain();
    let service = tower::service_fn(|_| async { Ok::<_, Infallible>(http::Response::new(Body::empty())) });
    let response = fixture.layer.layer(service).call(request(SCORE, None)).await.expect("infallible");
    assert_eq!(code(&response), Code::Unavailable);
}

/// Takes a body to its end.
async fn read(mut body: Body) -> Result<usize, tonic::Status> {
    let mut bytes = 0;
    while let Some(frame) = std::future::poll_fn(|context| http_body::Body::poll_frame(std::pin::Pin::new(&mut body), context)).await {
        bytes += frame?.data_ref().map_or(0, |data| data.len());
    }
    Ok(bytes)
}

#[tokio::test]
async fn a_message_that_turns_out_to_have_no_room_is_refused_while_it_is_read() {
    let fixture = bounded(AdmissionOptions { max_bytes: 10_000, ..Default::default() });
    let service = tower::service_fn(|request: http::Request<Body>| async move {
        let answer = read(request.into_body()).await;
        Ok::<_, Infallible>(answer.map_or_else(|status| status.into_http(), |_| http::Response::new(Body::empty())))
    });
    let mut gate = fixture.layer.layer(service);
    let message = |bytes: u32| [[0].as_slice(), &bytes.to_be_bytes(), &vec![7; bytes as usize]].concat();
    let mut ask = |bytes| {
        let request = http::Request::builder().uri(SCORE).body(Body::new(http_body_util::Full::new(message(bytes).into())));
        gate.call(request.expect("valid request"))
    };
    assert_eq!(code(&ask(9000).await.expect("infallible")), Code::Ok, "alone, and within its bound");
    let held = fixture.admission.admit(5000).expect("room");
    // Taken for 1000 bytes, both are let in.
    assert_eq!(code(&ask(4000).await.expect("infallible")), Code::Ok);
    assert_eq!(code(&ask(6000).await.expect("infallible")), Code::ResourceExhausted);
    assert_eq!(fixture.metric("warm_serve_shed_total{reason=\"bytes\"} "), 1.0);
    drop(held);
    assert_eq!(fixture.metric("warm_scorer_in_flight_bytes "), 0.0);
}

#[tokio::test]
async fn a_reply_holds_its_permit_until_it_is_read_or_nobody_wants_it() {
    let fixture = fixture(1);
    let service = tower::service_fn(|_| async {
        let trailers = http::HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), http::HeaderValue::from_static("0"))]);
        let body =
            http_body_util::BodyExt::with_trailers(http_body_util::Full::<bytes::Bytes>::from("reply"), async { Some(Ok(trailers)) });
        Ok::<_, Infallible>(http::Response::new(Body::new(body)))
    });
    let mut gate = fixture.layer.layer(service);
    let in_flight = || *fixture.admission.in_flight().borrow();
    let unread = gate.call(request(SCORE, None)).await.expect("infallible");
    assert_eq!(in_flight(), 1);
    drop(unread);
    assert_eq!(in_flight(), 0);
    let mut body = gate.call(request(SCORE, None)).await.expect("infallible").into_body();
    let mut next = async || std::future::poll_fn(|context| http_body::Body::poll_frame(std::pin::Pin::new(&mut body), context)).await;
    assert!(next().await.expect("a frame").expect("read").is_data());
    assert_eq!(in_flight(), 1);
    assert!(next().await.expect("a frame").expect("read").is_trailers());
    assert_eq!(in_flight(), 0, "before the caller knows of the end");
}

#[tokio::test]
async fn a_call_whose_caller_goes_is_counted_as_cancelled() {
    let fixture = fixture(1);
    let never = tower::service_fn(|_| std::future::pending::<Result<http::Response<Body>, Infallible>>());
    drop(fixture.layer.layer(never).call(request(SCORE, None)));
    assert_eq!(fixture.count("Score", "CANCELLED"), 1.0);
}

#[tokio::test]
async fn a_handler_runs_inside_the_span_of_its_call() {
    // With a single subscriber, a thread that has none could switch the span off for everybody; with two, all are asked.
    let _second = tracing::Dispatch::new(tracing_subscriber::registry());
    let _subscriber = tracing::subscriber::set_default(tracing_subscriber::registry());
    let fixture = fixture(1);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let look = {
        let seen = seen.clone();
        move || {
            let span = tracing::Span::current();
            let has_id = span.metadata().is_some_and(|metadata| metadata.fields().field("request_id").is_some());
            seen.lock().expect("one thread").push((span.metadata().map(|metadata| metadata.name()), has_id));
        }
    };
    let mut gate = fixture.layer.layer(tower::service_fn(move |_| {
        let look = look.clone();
        // While it is called, and while it is polled.
        look();
        async move {
            tokio::task::yield_now().await;
            look();
            Ok::<_, Infallible>(http::Response::new(Body::empty()))
        }
    }));
    gate.call(request(SCORE, None)).await.expect("infallible");
    assert_eq!(*seen.lock().expect("one thread"), [(Some("request"), true); 2]);
}

/// The lines that are logged on this thread while it is held.
struct Log {
    text: Arc<Mutex<Vec<u8>>>,
    _own: tracing::subscriber::DefaultGuard,
    /// A thread that has no subscriber cannot switch call sites off for everybody while there are two.
    _second: tracing::Dispatch,
}

impl Log {
    fn start() -> Self {
        #[derive(Clone)]
        struct Lines(Arc<Mutex<Vec<u8>>>);
        impl std::io::Write for Lines {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().expect("one thread").extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let _second = tracing::Dispatch::new(tracing_subscriber::registry());
        let text = Arc::new(Mutex::new(Vec::new()));
        let writer = Lines(text.clone());
        let subscriber = tracing_subscriber::fmt().json().flatten_event(true).with_writer(move || writer.clone()).finish();
        Self { text, _own: tracing::subscriber::set_default(subscriber), _second }
    }

    fn lines(&self) -> Vec<serde_json::Value> {
        let text = String::from_utf8(self.text.lock().expect("one thread").clone()).expect("UTF-8");
        text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
    }
}

fn answered(failed: usize) -> Answered {
    use crate::domain::{Fingerprint, GenerationId, WeightsId};
    let stamp = crate::registry::ModelStamp {
        fingerprint: Fingerprint([0xab; 32]),
        generation: GenerationId(3),
        instance: "i".into(),
        weights_id: WeightsId([1; 32]),
    };
    let timing = crate::registry::Timing { queue: Duration::from_millis(7), tokenize: Duration::from_millis(2), ..Default::default() };
    Answered { stamp, timing, tokens: 40, failed }
}

#[tokio::test]
async fn a_line_has_names_and_numbers_of_the_call() {
    let (log, fixture) = (Log::start(), fixture(1));
    let clock = fixture.clock.clone();
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let facts = request.extensions().get::<CallFacts>().expect("facts").clone();
        clock.advance(Duration::from_millis(12));
        async move {
            facts.asked("step-7", 5);
            facts.answered(answered(1));
            Ok::<_, Infallible>(http::Response::new(Body::empty()))
        }
    });
    let mut asked = request(SCORE, None);
    asked.headers_mut().insert(TENANT_HEADER, http::HeaderValue::from_static("team-a"));
    fixture.layer.layer(service).call(asked).await.expect("infallible");
    let lines = log.lines();
    let line = &lines[0];
    for (field, value) in [
        ("request_id", serde_json::json!("step-7")),
        ("rpc", "Score".into()),
        ("code", "OK".into()),
        ("tenant", "team-a".into()),
        ("fingerprint", "ab".repeat(32).into()),
        ("samples", 5.into()),
        ("failed", 1.into()),
        ("tokens", 40.into()),
        ("queue_ms", 7.0.into()),
        ("tokenize_ms", 2.0.into()),
        ("ms", 12.0.into()),
        ("level", "INFO".into()),
    ] {
        assert_eq!(line[field], value, "{field} in {line}");
    }
    assert_eq!(fixture.metric("warm_serve_tenant_tokens_total{tenant=\"team-a\"} "), 40.0);
    assert_eq!(fixture.metric("warm_serve_tenant_samples_total{tenant=\"team-a\"} "), 5.0);
    assert_eq!(fixture.metric("warm_serve_tenant_requests_total{tenant=\"team-a\"} "), 1.0);
}

#[tokio::test]
async fn successes_are_sampled_and_failures_are_not() {
    let (log, fixture) = (Log::start(), logging(1, CallLogOptions { successes: 0.1, content: false }));
    let calls = Arc::new(Mutex::new(0));
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let facts = request.extensions().get::<CallFacts>().expect("facts").clone();
        let mut call = calls.lock().expect("one thread");
        *call += 1;
        let response = match *call % 10 {
            1 => status::status(crate::registry::EngineError::Forward("secret".into())).into_http(),
            2 => {
                facts.answered(answered(1));
                http::Response::new(Body::empty())
            }
            _ => http::Response::new(Body::empty()),
        };
        async move { Ok::<_, Infallible>(response) }
    });
    let mut gate = fixture.layer.layer(service);
    for _ in 0..100 {
        gate.call(request(SCORE, None)).await.expect("infallible");
    }
    let count =
        |what: &dyn Fn(&serde_json::Value) -> bool| log.lines().iter().filter(|line| line["message"] == "request" && what(line)).count();
    assert_eq!(count(&|line| line["code"] == "INTERNAL" && line["level"] == "ERROR"), 10, "every failed call");
    assert_eq!(count(&|line| line["failed"] == 1), 10, "every call with a failed sample");
    assert_eq!(count(&|line| line["code"] == "OK" && line["failed"].is_null()), 8, "a tenth of 80 successes");
}

#[tokio::test]
async fn what_a_caller_sent_is_in_no_line_unless_content_may_be_logged() {
    for content in [false, true] {
        let (log, fixture) = (Log::start(), logging(1, CallLogOptions { successes: 1.0, content }));
        let refuse = tower::service_fn(|_| async {
            let violations = crate::serve::convert::Violations::one("samples[0].text", "the template says: no secret words");
            Ok::<_, Infallible>(status::invalid(&violations).into_http())
        });
        fixture.layer.layer(refuse).call(request(SCORE, None)).await.expect("infallible");
        let text = format!("{:?} {:?}", log.lines(), fixture.recent.problems());
        assert!(text.contains("samples[0].text"), "the field: {text}");
        assert_eq!(text.contains("secret"), content, "{text}");
        assert!(matches!(&fixture.recent.problems()[..], [Problem { rpc: "Score", code: "INVALID_ARGUMENT", count: 1, .. }]));
    }
}

#[test]
fn timeouts_are_read_as_grpc_writes_them() {
    assert_eq!(parse_timeout(b"250m"), Some(Duration::from_millis(250)));
    assert_eq!(parse_timeout(b"99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
    for bad in ["", "m", "5", "5x", "-5m", "123456789n", "1.5S"] {
        assert_eq!(parse_timeout(bad.as_bytes()), None, "{bad}");
    }
}

proptest! {
    #[test]
    fn the_margin_leaves_most_of_the_time(ms in 0u64..100_000) {
        let timeout = Duration::from_millis(ms);
        prop_assert!(margin(timeout) <= timeout / 5 && margin(timeout) <= Duration::from_millis(10));
    }

    #[test]
    fn no_timeout_header_panics(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
        let _ = parse_timeout(&bytes);
    }
}
