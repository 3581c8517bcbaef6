use std::convert::Infallible;

use prometheus::Registry;
use proptest::prelude::*;

use super::*;
use crate::scorer::{AdmissionOptions, Permit, ScorerMetrics};

struct Fixture {
    registry: Registry,
    clock: Clock,
    admission: Admission,
    layer: GateLayer,
}

fn fixture(max_requests: usize) -> Fixture {
    let registry = Registry::new();
    let clock = Clock::manual();
    let scorer = ScorerMetrics::register(&registry).expect("fresh registry");
    let admission = Admission::new(AdmissionOptions { max_requests, ..Default::default() }, scorer);
    let metrics = ServeMetrics::register(&registry).expect("fresh registry");
    let options = GateOptions { clock: clock.clone(), admission: admission.clone(), metrics, assumed_bytes: 1000, max_bytes: 2000 };
    Fixture { registry, clock, admission, layer: GateLayer::new(options) }
}

impl Fixture {
    fn count(&self, rpc: &str, code: &str) -> f64 {
        let text = prometheus::TextEncoder::new().encode_to_string(&self.registry.gather()).expect("text");
        let series = format!("warm_serve_requests_total{{code=\"{code}\",rpc=\"{rpc}\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&series)).expect("series present").parse().expect("number")
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
