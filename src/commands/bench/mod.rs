//! `warm bench`: a load generator for any `warm` server. It counts latency from when a request was due, so that a server
//! that stalls cannot hide what it kept waiting.

mod arrivals;
mod load;
mod random;
mod report;
mod server;
mod shape;
mod tally;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use self::arrivals::Arrivals;
use self::load::{Pace, Window};
use self::report::{Groups, Report};
use self::server::{Connections, Server, Stream};
use self::shape::{Shape, Span};
use self::tally::Tally;
use super::{CommandError, runtime};
use crate::client::{Client, ClientError};
use crate::clock::Clock;
use crate::config::parse_duration;
use crate::shutdown::Signals;
use crate::wire;

/// Callers that share one connection: HTTP/2 servers take about a hundred streams at once.
const CALLERS_PER_CONNECTION: usize = 64;

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// Where the server listens.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:50051")]
    addr: String,
    /// Open loop: so many requests a second on average, at random times, whatever has come back.
    #[arg(long, value_name = "R", conflicts_with = "concurrency")]
    rate: Option<f64>,
    /// Closed loop: so many callers, each waiting for its answer before it asks again.
    #[arg(long, value_name = "N", default_value_t = 1)]
    concurrency: usize,
    /// Random tokens that the completions of a request share: a number or a range.
    #[arg(long, value_name = "SPAN", default_value = "512")]
    prompt_tokens: Span,
    /// Random tokens of each completion.
    #[arg(long, value_name = "SPAN", default_value = "32..512")]
    completion_tokens: Span,
    /// Completions of a request.
    #[arg(long, value_name = "N", default_value_t = 16)]
    group: usize,
    /// Lines as `warm score` reads them, or {"prompt_tokens", "completion_tokens": N or [N, ...]}; sent in turn.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt_tokens", "completion_tokens", "group"])]
    input: Option<PathBuf>,
    /// Every completion in a request of its own.
    #[arg(long)]
    singles: bool,
    /// Requests share a stream on each connection instead of having calls of their own.
    #[arg(long)]
    stream: bool,
    /// How long requests are sent and counted.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    /// How long requests are sent before that.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = parse_duration)]
    warmup: Duration,
    /// Requests in all, the warm-up's among them, if that is less.
    #[arg(long, value_name = "N")]
    requests: Option<u64>,
    /// The deadline of each request.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    timeout: Duration,
    /// An answer that takes longer is not counted as good.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    objective: Option<Duration>,
    /// Requests under way at once, in the open loop.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    in_flight: usize,
    /// Connections; by default one for every 64 requests that may be under way.
    #[arg(long, value_name = "N")]
    connections: Option<usize>,
    /// The same seed sends the same requests.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Random token ids are below this; by default what the server says of its model.
    #[arg(long, value_name = "N")]
    vocabulary: Option<u32>,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: BenchArgs) -> Result<ExitCode, CommandError> {
    let wrong = |words: &str| Err(CommandError::Other(words.to_owned()));
    if arguments.rate.is_some_and(|rate| !(1e-3..=1e6).contains(&rate)) {
        return wrong("--rate: expected between 0.001 and 1000000 requests a second");
    }
    if arguments.concurrency == 0 || arguments.group == 0 || arguments.in_flight == 0 || arguments.connections == Some(0) {
        return wrong("--concurrency, --group, --in-flight and --connections: expected at least 1");
    }
    runtime()?.block_on(drive(&arguments))
}

async fn drive(arguments: &BenchArgs) -> Result<ExitCode, CommandError> {
    let clock = Clock::system();
    let under_way = if arguments.rate.is_some() { arguments.in_flight } else { arguments.concurrency };
    let connections = arguments.connections.unwrap_or_else(|| under_way.div_ceil(CALLERS_PER_CONNECTION));
    let clients = connect(&arguments.addr, connections).await?;
    let model = clients[0].get_model().await?;
    let shape = shape(arguments, &model)?;
    let load = words(arguments);
    eprintln!("{load}");
    let signals = Signals::listen().map_err(|error| CommandError::Other(error.to_string()))?;
    let pace = match arguments.rate {
        Some(rate) => Pace::Open { arrivals: Arrivals::poisson(rate, arguments.seed), in_flight: arguments.in_flight },
        None => Pace::Closed { callers: arguments.concurrency },
    };
    let window = Window { warmup: arguments.warmup, duration: arguments.duration, requests: arguments.requests };
    let tally = Tally::new(arguments.warmup, arguments.objective);
    let target = Arc::new(Server { shape, timeout: arguments.timeout, connections: over(clients, arguments.stream).await? });
    let mut stopped = false;
    let stop = async {
        signals.first().await;
        stopped = true;
    };
    let tally = load::run(target, pace, window, tally, clock, stop).await;
    let report = Report { address: &arguments.addr, model: &model, load: &load, workload: groups(arguments), tally: &tally, stopped };
    if arguments.json {
        println!("{}", report.json());
    } else {
        println!("{report}");
    }
    Ok(if tally.scored.summary().count > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The groups that are sent, where one goes with each request.
fn groups(arguments: &BenchArgs) -> Option<Groups> {
    let mean = |span: Span| (f64::from(span.least) + f64::from(span.most)) / 2.0;
    let (prompt_tokens, completion_tokens) = (mean(arguments.prompt_tokens), mean(arguments.completion_tokens));
    let whole = arguments.input.is_none() && !arguments.singles;
    whole.then_some(Groups { group: arguments.group, prompt_tokens, completion_tokens })
}

async fn connect(address: &str, connections: usize) -> Result<Vec<Client>, ClientError> {
    let mut clients = Vec::with_capacity(connections);
    for _ in 0..connections {
        clients.push(Client::connect(address).await?);
    }
    Ok(clients)
}

async fn over(clients: Vec<Client>, stream: bool) -> Result<Connections, ClientError> {
    if !stream {
        return Ok(Connections::Calls(clients));
    }
    let mut streams = Vec::with_capacity(clients.len());
    for client in &clients {
        streams.push(Stream::open(client).await?);
    }
    Ok(Connections::Streams(streams))
}

fn shape(arguments: &BenchArgs, model: &wire::Generation) -> Result<Shape, CommandError> {
    let vocabulary = arguments.vocabulary.unwrap_or(model.vocabulary);
    let shape = match &arguments.input {
        None => Shape::random(arguments.prompt_tokens, arguments.completion_tokens, arguments.group, vocabulary, arguments.seed),
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|error| CommandError::file(path, error))?;
            Shape::from_lines(&text, vocabulary, arguments.seed).map_err(|error| CommandError::file(path, error))?
        }
    };
    let longest = shape.longest();
    if longest > 0 && vocabulary == 0 {
        return Err(CommandError::Other(
            "the server does not say which token ids its model knows: name their number with --vocabulary".to_owned(),
        ));
    }
    if longest > model.max_tokens {
        return Err(CommandError::Other(format!(
            "samples of up to {longest} tokens were asked for, and the model takes at most {}",
            model.max_tokens
        )));
    }
    Ok(if arguments.singles { shape.singly() } else { shape })
}

/// The load, for people.
fn words(arguments: &BenchArgs) -> String {
    let pace = match arguments.rate {
        Some(rate) => format!("open loop, {rate} requests/s (Poisson)"),
        None => format!("closed loop, {} callers", arguments.concurrency),
    };
    let what = match &arguments.input {
        Some(path) => format!("lines of {}", path.display()),
        None => {
            format!(
                "{} completions of {} tokens after a prompt of {}",
                arguments.group, arguments.completion_tokens, arguments.prompt_tokens
            )
        }
    };
    let each = if arguments.singles { ", each in its own request" } else { "" };
    let how = if arguments.stream { ", on streams" } else { "" };
    format!("{pace}{how}, seed {}: {what}{each}", arguments.seed)
}
