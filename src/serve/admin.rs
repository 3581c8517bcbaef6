//! Probes, metrics and the status page on a thread and runtime of their own, so that they answer while the data path is full
//! and while a model loads for minutes.

use std::net::{SocketAddr, TcpListener};
use std::thread::JoinHandle;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::{Registry, TextEncoder};
use tokio::sync::oneshot;

use super::page::{HTML, Page, SECURITY_POLICY, STEP};
use super::readiness::{Phase, Readiness};
use crate::registry::Engine;

/// The admin port could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("admin port {address}: {problem}")]
pub struct AdminError {
    pub address: String,
    pub problem: String,
}

/// A running admin port. It closes when this is dropped.
#[derive(Debug)]
pub struct Admin {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone)]
struct Shown {
    readiness: Readiness,
    registry: Registry,
    page: Page,
}

impl Admin {
    /// Answers `/livez`, `/readyz`, `/metrics`, `/watch` and the status page at `/` on a listener that is bound already.
    pub fn start(listener: TcpListener, readiness: Readiness, registry: Registry, engine: Engine) -> Result<Self, AdminError> {
        let failed = |error: std::io::Error| AdminError { address: "listener".to_owned(), problem: error.to_string() };
        let address = listener.local_addr().map_err(failed)?;
        let failed = |error: std::io::Error| AdminError { address: address.to_string(), problem: error.to_string() };
        listener.set_nonblocking(true).map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().map_err(failed)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let page = Page::new(readiness.clone(), registry.clone(), engine);
        let shown = Shown { readiness, registry, page: page.clone() };
        let run = move || {
            runtime.block_on(async move {
                let listener = match tokio::net::TcpListener::from_std(listener) {
                    Ok(listener) => listener,
                    Err(error) => return tracing::error!(%error, "the admin port cannot be served"),
                };
                let sampling = async move {
                    let mut steps = tokio::time::interval(STEP);
                    steps.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                    loop {
                        steps.tick().await;
                        page.sample();
                    }
                };
                // Open connections are cut when the process is done with it, so nothing is waited for here.
                tokio::select! {
                    () = sampling => {}
                    result = axum::serve(listener, router(shown)) => {
                        if let Err(error) = result {
                            tracing::error!(%error, "the admin port has failed");
                        }
                    }
                    _ = stopped => {}
                }
            });
        };
        let thread = std::thread::Builder::new().name("warm-admin".to_owned()).spawn(run).map_err(failed)?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
    }
}

fn router(shown: Shown) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/status.json", get(status))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/watch", get(watch))
        .with_state(shown)
}

async fn page() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, HTML).into_response()
}

async fn watch(State(shown): State<Shown>) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    match shown.page.watch() {
        Some(report) => (headers, report.to_string()).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn status(State(shown): State<Shown>) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    (headers, shown.page.json().to_string()).into_response()
}

/// A process without its device worker answers nothing any more, and only a new one helps.
async fn livez(State(shown): State<Shown>) -> Response {
    if shown.page.is_alive() {
        "live\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the device worker has stopped\n").into_response()
    }
}

async fn readyz(State(shown): State<Shown>) -> Response {
    let phase = shown.readiness.phase();
    let code = if phase == Phase::Ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, format!("{}\n", phase.name())).into_response()
}

async fn metrics(State(shown): State<Shown>) -> Response {
    match TextEncoder::new().encode_to_string(&shown.registry.gather()) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::registry::testing::stepped;
    use crate::scorer::ScorerOptions;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    fn get(address: SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).expect("admin port");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answer");
        let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("status line");
        (code, answer)
    }

    #[test]
    fn probes_follow_readiness_and_metrics_show_every_series() {
        let (readiness, registry) = (Readiness::default(), Registry::new());
        crate::serve::ServeMetrics::register(&registry).expect("fresh registry");
        let listener = TcpListener::bind("127.0.0.1:0").expect("free port");
        let (engine, worker) = stepped(ScorerOptions::default(), Clock::system());
        let admin = Admin::start(listener, readiness.clone(), registry, engine).expect("admin");
        assert_eq!(get(admin.address(), "/livez").0, 200);
        assert_eq!(get(admin.address(), "/readyz").0, 503);
        readiness.advance(Phase::Ready);
        assert_eq!(get(admin.address(), "/readyz").0, 200);
        readiness.advance(Phase::Draining);
        let (code, text) = get(admin.address(), "/readyz");
        assert_eq!((code, text.ends_with("draining\n")), (503, true));
        assert_eq!(get(admin.address(), "/livez").0, 200);
        let (code, metrics) = get(admin.address(), "/metrics");
        assert_eq!(code, 200);
        for series in [
            "warm_build_info{commit=",
            "warm_serve_requests_total{code=\"OK\",rpc=\"Score\"} 0",
            "warm_serve_requests_total{code=\"DEADLINE_EXCEEDED\",rpc=\"Compare\"} 0",
            "warm_serve_request_seconds_bucket{rpc=\"GetModel\",le=\"0.0001\"} 0",
            "warm_serve_in_flight_requests{rpc=\"ListGenerations\"} 0",
        ] {
            assert!(metrics.contains(series), "{series}\n{metrics}");
        }
        let (code, page) = get(admin.address(), "/");
        assert!(code == 200 && page.contains("<!doctype html>") && page.contains("content-security-policy: default-src 'none'"), "{page}");
        let (code, status) = get(admin.address(), "/status.json");
        let body = status.split_once("\r\n\r\n").expect("a body").1;
        let status: serde_json::Value = serde_json::from_str(body).expect("JSON");
        assert_eq!((code, &status["phase"], &status["instance"]), (200, &"draining".into(), &"test".into()));
        drop(worker);
        assert_eq!(get(admin.address(), "/livez").0, 503, "nobody is left to score");
        let address = admin.address();
        drop(admin);
        assert!(TcpStream::connect(address).is_err(), "the port closes with its owner");
    }
}
