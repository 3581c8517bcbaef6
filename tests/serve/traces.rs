//! Traces, as a collector receives them from the binary.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use tonic::transport::server::TcpIncoming;
use warm::client::Client;
use warm::serve::tenants::TENANT_HEADER;
use warm::wire::{self, sample::Input};

use super::binary::{admin, serve_with, terminate, wait_for};
use super::live::Files;

/// Keeps what is sent to it.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.0.lock().expect("no panic").push(request.into_inner());
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

fn words(value: &Value) -> String {
    match value {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        other => format!("{other:?}"),
    }
}

fn attributes(span: &Span) -> HashMap<String, String> {
    let all = span.attributes.iter().filter_map(|pair| Some((pair.key.clone(), words(pair.value.as_ref()?.value.as_ref()?))));
    all.collect()
}

const TRACE: [u8; 16] = [0x0a, 0xf7, 0x65, 0x19, 0x16, 0xcd, 0x43, 0xdd, 0x84, 0x48, 0xeb, 0x21, 0x1c, 0x80, 0x31, 0x9c];

impl Collector {
    /// Receives on a free port until the task is aborted.
    async fn start() -> (Self, String, tokio::task::JoinHandle<()>) {
        let collector = Self::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("free port");
        let endpoint = format!("http://{}", listener.local_addr().expect("address"));
        let service = TraceServiceServer::new(collector.clone());
        let receiving = tonic::transport::Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener));
        (collector, endpoint, tokio::spawn(async move { receiving.await.expect("a server") }))
    }

    fn spans(&self) -> Vec<Span> {
        let requests = self.0.lock().expect("no panic").clone();
        let scopes = requests.into_iter().flat_map(|request| request.resource_spans).flat_map(|resource| resource.scope_spans);
        scopes.flat_map(|scope| scope.spans).collect()
    }
}

/// A field of the next line of JSON with this message.
fn field_of_line(log: &mut impl BufRead, message: &str, field: &str) -> String {
    let mut line = String::new();
    while log.read_line(&mut line).expect("log") > 0 {
        let found: serde_json::Value = serde_json::from_str(&line).expect("a line of JSON");
        if found["message"] == message {
            return found[field].as_str().unwrap_or_default().to_owned();
        }
        line.clear();
    }
    panic!("the log ended before `{message}`");
}

/// What a server shows of the calls that it answered, to others than the caller.
struct Shown {
    /// Every line after `ready`.
    log: String,
    /// All pages of the admin port.
    pages: String,
}

/// Starts a server with these settings, has it asked, and stops it; the answers, what it showed, and what a collector received.
async fn shown_by<T, F>(settings: &[&str], ask: impl FnOnce(Client) -> F + Send + 'static) -> (T, Shown, Collector)
where
    T: Send + 'static,
    F: Future<Output = T>,
{
    let (collector, endpoint, receiving) = Collector::start().await;
    let mut settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
    settings.extend(["--traces-endpoint", &endpoint, "--log-format", "json", "--log-successes", "1"].map(str::to_owned));
    let asked = tokio::task::spawn_blocking(move || {
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        let mut server = serve_with(&settings, super::members());
        let mut log = BufReader::new(server.stderr.take().expect("piped"));
        let mut listening = String::new();
        log.read_line(&mut listening).expect("log");
        let listening: serde_json::Value = serde_json::from_str(&listening).expect("a line of JSON");
        let [address, probes] = ["grpc", "admin"].map(|name| listening[name].as_str().expect("an address").to_owned());
        field_of_line(&mut log, "ready", "");
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        let answers = runtime.block_on(async { ask(Client::connect(&address).await.expect("connected")).await });
        let pages = ["/metrics", "/watch", "/status.json", "/"].map(|path| admin(&probes, path)).concat();
        terminate(&server);
        let mut rest = String::new();
        log.read_to_string(&mut rest).expect("log");
        assert_eq!(server.wait().expect("ended").code(), Some(0), "{rest}");
        (answers, Shown { log: rest, pages })
    });
    let (answers, shown) = asked.await.expect("no panic");
    receiving.abort();
    (answers, shown, collector)
}

impl Shown {
    /// Panics where any of these words stand in what others see.
    fn assert_without(&self, words: &str, collector: &Collector) {
        let traces = format!("{:?}", collector.0.lock().expect("no panic"));
        for (place, text) in [("a trace", &traces), ("a line", &self.log), ("a metric or a page", &self.pages)] {
            assert!(!text.contains(words), "what a caller says is in {place}: {text}");
        }
    }

    fn lines(&self) -> Vec<serde_json::Value> {
        self.log.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_is_a_line_and_a_trace_under_its_callers_own_with_numbers_and_no_text() {
    let (response, shown, collector) = shown_by(&["--traces-share", "0"], |client: Client| async move {
        let sample = wire::Sample { input: Some(Input::Text("secret words of a caller".into())) };
        let request = |id: &str| wire::ScoreRequest { request_id: id.into(), samples: vec![sample.clone()], ..Default::default() };
        let mut traced = tonic::Request::new(request("traced"));
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        traced.metadata_mut().insert("traceparent", parent.parse().expect("metadata"));
        traced.metadata_mut().insert(TENANT_HEADER, "team-a".parse().expect("metadata"));
        // Of traces that begin here none is kept.
        client.score(request("untraced")).await.expect("scored");
        client.rewards().score(traced).await.expect("scored").into_inner()
    })
    .await;
    shown.assert_without("secret", &collector);

    let requests = collector.0.lock().expect("no panic").clone();
    let resource = requests[0].resource_spans[0].resource.as_ref().expect("a resource");
    let service = resource.attributes.iter().find(|pair| pair.key == "service.name").and_then(|pair| pair.value.clone());
    assert_eq!(service.and_then(|value| value.value).as_ref().map(words).as_deref(), Some("warm"));
    let spans = collector.spans();
    assert!(spans.iter().all(|span| span.trace_id == TRACE), "only the caller's own trace: {spans:#?}");
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("no span {name} in {spans:#?}"));

    let request = named("request");
    assert_eq!(request.parent_span_id, [0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31]);
    let of_request = attributes(request);
    let fingerprint = response.model.expect("stamp").fingerprint;
    for (key, value) in [("rpc", "Score"), ("request_id", "traced"), ("code", "OK"), ("samples", "1"), ("fingerprint", &fingerprint)] {
        assert_eq!(of_request.get(key).map(String::as_str), Some(value), "{key} of {of_request:?}");
    }
    let tokens = response.scores[0].tokens.to_string();
    assert_eq!(of_request.get("tokens"), Some(&tokens));
    for stage in ["admission", "tokenize", "device", "reply"] {
        assert_eq!(named(stage).parent_span_id, request.span_id, "{stage}");
    }
    for (stage, within) in [("queue", "device"), ("pack", "device"), ("forward", "pack")] {
        assert_eq!(named(stage).parent_span_id, named(within).span_id, "{stage}");
    }
    let (queue, pack) = (named("queue"), named("pack"));
    assert!(queue.start_time_unix_nano <= queue.end_time_unix_nano && queue.end_time_unix_nano <= pack.end_time_unix_nano);
    let device = attributes(named("device"));
    assert_eq!((device.get("tokens"), attributes(pack).get("tokens")), (Some(&tokens), Some(&tokens)));
    assert!(device.contains_key("queue_us") && device.contains_key("forward_us"), "{device:?}");

    let line = shown.lines().into_iter().find(|line| line["request_id"] == "traced").expect("every success has a line");
    for (field, value) in [("tenant", "team-a"), ("fingerprint", &fingerprint), ("code", "OK"), ("rpc", "Score"), ("level", "INFO")] {
        assert_eq!(line[field], value, "{field} of {line}");
    }
    assert_eq!((&line["samples"], &line["failed"], line["tokens"].to_string()), (&1.into(), &0.into(), tokens));
    assert!(line["peer"].as_str().is_some_and(|peer| peer.starts_with("127.0.0.1:")), "{line}");
    for stage in ["tokenize_ms", "queue_ms", "forward_ms", "ms"] {
        assert!(line[stage].as_f64().is_some_and(|time| time >= 0.0), "{stage} of {line}");
    }
}

/// What fails is always logged, and the words of a failure may quote the sample.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sample_that_fails_tells_its_caller_why_and_nobody_else_what_it_said() {
    let folder = tempfile::tempdir().expect("a folder");
    let template = folder.path().join("refusing.jinja");
    std::fs::write(&template, "{{ raise_exception('no such words: ' + messages[0]['content']) }}").expect("written");
    let settings = ["--traces-share", "1", "--text-template", template.to_str().expect("a plain path")];
    let ((mild, strict), shown, collector) = shown_by(&settings, |client: Client| async move {
        let message = wire::Message { role: "user".into(), content: "secret words".into(), ..Default::default() };
        let conversation = wire::Conversation { messages: vec![message], ..Default::default() };
        let inputs = [Input::Text("secret ".repeat(100_000)), Input::Conversation(conversation)];
        let samples: Vec<_> = inputs.map(|input| wire::Sample { input: Some(input) }).into();
        let mild = wire::ScoreRequest { request_id: "mild".into(), samples: samples.clone(), ..Default::default() };
        let mild = client.score(mild).await.expect("failures in the places of their samples");
        let mut strict = Vec::new();
        for sample in samples {
            let options = Some(wire::ScoreOptions { strict: true, ..Default::default() });
            let request = wire::ScoreRequest { request_id: "strict".into(), samples: vec![sample], options, ..Default::default() };
            strict.push(client.score(request).await.expect_err("the call fails with its sample").to_string());
        }
        (mild, strict)
    })
    .await;
    let failures: Vec<String> = mild.scores.into_iter().map(|score| score.failure.expect("a failure").message).collect();
    assert!(failures[1].contains("secret words"), "the caller may read it: {failures:?}");
    assert!(strict[1].contains("secret words"), "{strict:?}");
    let lines = shown.lines();
    for (id, count) in [("mild", 1), ("strict", 2)] {
        assert_eq!(lines.iter().filter(|line| line["request_id"] == id).count(), count, "{lines:?}");
    }
    for kind in ["too_long", "template_refused"] {
        let none = format!("warm_registry_failures_total{{kind=\"{kind}\"}} 0\n");
        assert!(shown.pages.contains(none.trim_end_matches("0\n")) && !shown.pages.contains(&none), "{kind}: {}", shown.pages);
    }
    assert!(collector.spans().iter().any(|span| attributes(span).get("request_id").is_some_and(|id| id == "strict")));
    shown.assert_without("secret", &collector);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_is_a_trace_of_its_own() {
    let (collector, endpoint, receiving) = Collector::start().await;
    let reloaded = tokio::task::spawn_blocking(move || {
        let files = Files::new();
        files.want(&[0, 1], "");
        let config = files.config();
        let settings = ["--traces-endpoint", &endpoint, "--traces-share", "1", "--config", config.to_str().expect("a plain path")];
        let mut server = serve_with(&settings, Vec::<std::path::PathBuf>::new());
        let mut log = BufReader::new(server.stderr.take().expect("piped"));
        let address = wait_for(&mut log, "listening", "grpc").expect("address");
        wait_for(&mut log, "ready", "");
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        let fingerprint = runtime.block_on(async {
            let client = Client::connect(&address).await.expect("connected");
            files.want(&[0, 1, 2], "");
            let last = client.reload(wire::ReloadRequest::default(), |_| {}).await.expect("loaded");
            last.result.expect("a generation").stamp.expect("a stamp").fingerprint
        });
        terminate(&server);
        let mut rest = String::new();
        log.read_to_string(&mut rest).expect("log");
        assert_eq!(server.wait().expect("ended").code(), Some(0), "{rest}");
        fingerprint
    });
    let fingerprint = reloaded.await.expect("no panic");
    receiving.abort();
    let spans = collector.spans();
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("no span {name} in {spans:#?}"));
    let (load, reload) = (named("load"), named("reload"));
    assert!(reload.parent_span_id.is_empty() && reload.trace_id != load.trace_id, "{spans:#?}");
    assert_eq!(attributes(reload).get("fingerprint"), Some(&fingerprint));
    assert!(attributes(reload).contains_key("cause"), "{reload:?}");
    assert!(attributes(load).get("fingerprint").is_some_and(|first| *first != fingerprint), "{load:?}");
}
