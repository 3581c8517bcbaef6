//! `warm demo`: the whole way on one machine. Merges the bundled family, serves it on a free port, and asks it as a trainer
//! would: a few prompts with several completions each, through a real gRPC client.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Deserialize;

use super::demo_report::{Cost, Efficiency, PromptTable};
use super::progress::Reports;
use super::{CommandError, Environment, instance, runtime};
use crate::app::{App, AppError, load_spec, loader};
use crate::client::{Client, ClientError, group_to_wire};
use crate::clock::Clock;
use crate::config::{Resolved, Sources};
use crate::domain::{Completion, Conversation, Prompt, PromptGroup};
use crate::serve::Admin;
use crate::shutdown::{Signals, Stop};
use crate::telemetry;
use crate::wire;

/// Each way of scoring is timed this often, and the median counts.
const ROUNDS: usize = 5;

#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// A folder with one sub-folder per member (`rm-*`) in place of the bundled family.
    #[arg(long, value_name = "DIR")]
    family: Option<PathBuf>,
    /// Prompts in place of the bundled ones: lines of {"prompt", "completions"}.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Leave the server up until Ctrl-C.
    #[arg(long)]
    keep: bool,
}

/// One prompt with its completions.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct DemoPrompt {
    pub prompt: String,
    pub completions: Vec<String>,
}

pub(super) fn run(arguments: DemoArgs, environment: Environment) -> Result<ExitCode, CommandError> {
    let bundled = bundled(std::env::current_exe().ok().as_deref());
    let family = arguments.family.unwrap_or_else(|| bundled.join("family"));
    let members = members(&family)?;
    let prompts = prompts(&arguments.prompts.unwrap_or_else(|| bundled.join("prompts.jsonl")))?;
    let instance = instance(&environment);
    // The same batch is timed in several rounds, each of which is to be computed.
    let whole = ("prefix_cache_bytes", "off");
    let flags = [("ensemble", "resident"), ("listen", "127.0.0.1:0"), ("admin.listen", "127.0.0.1:0"), ("log.filter", "warn"), whole];
    let flags = flags.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    let config = Resolved::new(Sources { flags, folders: members.clone(), ..Sources::default() })?.config;
    telemetry::start(config.log_format, &config.log_filter)?;
    let spec = load_spec(&config)?;
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let clock = Clock::system();
        let app = App::new(&config, clock.clone(), instance)?;
        let mut signals = Some(Signals::listen().map_err(AppError::Thread)?);
        let admin = std::net::TcpListener::bind(config.admin_listen).map_err(AppError::Thread)?;
        let admin = Admin::start(admin, app.readiness().clone(), app.metrics().clone(), app.engine().clone()).map_err(AppError::from)?;
        let listener = tokio::net::TcpListener::bind(config.listen).await.map_err(AppError::Thread)?;
        let address = listener.local_addr().map_err(AppError::Thread)?;
        println!("merging {} reward models from {} ...", members.len(), family.display());
        let started = clock.now();
        let mut reports = Reports::new(clock.clone());
        app.load(loader(spec, clock.clone()), &mut |progress| {
            if let Some(words) = reports.say(&progress) {
                eprintln!("  {words}");
            }
        })?;
        let loaded = clock.now().saturating_duration_since(started);
        println!("merged and loaded in {:.1} s, serving on {address}\n", loaded.as_secs_f64());

        let (stop, stopped) = tokio::sync::oneshot::channel::<Stop>();
        let keep = if arguments.keep { signals.take() } else { None };
        let serving = app.serve(listener, std::future::ready(Ok(())), async { stopped.await.unwrap_or(Stop::Interrupt) });
        let trainer = async {
            let client = Client::connect(&address.to_string()).await?;
            play(&client, &prompts, &clock).await?;
            let admin = admin.address();
            println!("gRPC      {address}    (health, reflection)\nstatus    http://{admin}/\nmetrics   http://{admin}/metrics\nprobes    http://{admin}/livez  http://{admin}/readyz");
            if let Some(signals) = keep {
                println!("\nserving until Ctrl-C");
                signals.first().await;
            }
            drop(client);
            // The server may have failed by itself, which it says itself.
            let _ = stop.send(Stop::Interrupt);
            Ok::<_, CommandError>(())
        };
        let (served, played) = tokio::join!(serving, trainer);
        played?;
        served?;
        Ok::<_, CommandError>(())
    });
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

/// Where the demo's own folder is: beside the binary, if somebody has put it there, or in the source tree that it was built from.
fn bundled(binary: Option<&Path>) -> PathBuf {
    let beside = binary.and_then(Path::parent).map(|folder| folder.join("demo"));
    let tree = || Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    beside.filter(|folder| folder.join("family").is_dir()).unwrap_or_else(tree)
}

/// The members' folders, in the order of their names.
fn members(family: &Path) -> Result<Vec<PathBuf>, CommandError> {
    let explain = |problem: String| {
        let hint = "the demo's reward models are not part of the binary: run it in a checkout of the source, put its folder demo \
                    beside the binary, or name other members with --family DIR";
        CommandError::Other(format!("{}: {problem} ({hint})", family.display()))
    };
    let entries = std::fs::read_dir(family).map_err(|error| explain(error.to_string()))?;
    let mut members: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("rm-")))
        .collect();
    members.sort();
    if members.is_empty() { Err(explain("expected folders named rm-*, found none".to_owned())) } else { Ok(members) }
}

fn prompts(path: &Path) -> Result<Vec<DemoPrompt>, CommandError> {
    let text = std::fs::read_to_string(path).map_err(|error| CommandError::file(path, error))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let read = |(i, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|error| CommandError::Other(format!("{}: line {}: {error}", path.display(), i + 1)))
    };
    lines.map(read).collect()
}

/// What an RL worker does, and what it sees.
async fn play(client: &Client, prompts: &[DemoPrompt], clock: &Clock) -> Result<(), CommandError> {
    let mut groups = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let completions = prompt.completions.iter().cloned().map(Completion::Text).collect();
        let group = PromptGroup::new(Prompt::Conversation(Conversation::user(prompt.prompt.clone())), completions);
        groups.push(group_to_wire(&group.map_err(|invalid| CommandError::Other(invalid.to_string()))?));
    }
    let response = client.compare(wire::CompareRequest { groups: groups.clone(), ..Default::default() }).await?;
    let mut out = io::stdout().lock();
    let mut write = |text: &dyn std::fmt::Display| writeln!(out, "{text}").map_err(|error| CommandError::Other(error.to_string()));
    for (prompt, group) in prompts.iter().zip(&response.groups) {
        write(&PromptTable { prompt, members: &response.members, group })?;
    }
    let generation = client.get_model().await?;
    write(&measure(client, &groups, &response.members, &generation, clock).await?)?;
    let fingerprint = generation.stamp.unwrap_or_default().fingerprint;
    write(&format_args!("fingerprint {fingerprint}\n"))
}

/// The same batch by the merged model, and by each member in its turn.
async fn measure(
    client: &Client,
    groups: &[wire::PromptGroup],
    members: &[String],
    generation: &wire::Generation,
    clock: &Clock,
) -> Result<Efficiency, CommandError> {
    let mut warm = Vec::new();
    let mut ensemble = Vec::new();
    for _ in 0..ROUNDS {
        warm.push(timed(client, groups, "", clock).await?);
        let mut total = (Duration::ZERO, 0, 0);
        for member in members {
            let (took, scores, tokens) = timed(client, groups, member, clock).await?;
            total = (total.0 + took, scores, tokens);
        }
        ensemble.push(total);
    }
    let models = 1 + members.len() as u64;
    let bytes = generation.device_bytes / models;
    Ok(Efficiency {
        warm: Cost::new(1, median(warm), bytes),
        ensemble: Cost::new(members.len(), median(ensemble), bytes * members.len() as u64),
    })
}

/// How long one batch takes on the whole way there and back, how many scores it gave, and of how many tokens.
async fn timed(client: &Client, groups: &[wire::PromptGroup], scorer: &str, clock: &Clock) -> Result<(Duration, usize, u64), ClientError> {
    let options = wire::ScoreOptions { scorer: scorer.to_owned(), ..Default::default() };
    let request = wire::ScoreRequest { groups: groups.to_vec(), options: Some(options), ..Default::default() };
    let started = clock.now();
    let response = client.score(request).await?;
    let took = clock.now().saturating_duration_since(started);
    let scores = || response.groups.iter().flat_map(|group| &group.scores);
    Ok((took, scores().count(), scores().map(|score| u64::from(score.tokens)).sum()))
}

fn median(mut rounds: Vec<(Duration, usize, u64)>) -> (Duration, usize, u64) {
    rounds.sort();
    rounds.get(rounds.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_that_is_not_there_says_what_to_do() {
        let error = members(Path::new("/nowhere/family")).expect_err("no folder").to_string();
        assert!(error.contains("not part of the binary") && error.contains("--family"), "{error}");
    }

    #[test]
    fn the_family_beside_the_binary_is_nearer_than_that_of_the_source_tree() {
        let dir = tempfile::tempdir().expect("a folder");
        let binary = dir.path().join("warm");
        assert_eq!(bundled(Some(&binary)), Path::new(env!("CARGO_MANIFEST_DIR")).join("demo"));
        std::fs::create_dir_all(dir.path().join("demo/family")).expect("a folder");
        assert_eq!(bundled(Some(&binary)), dir.path().join("demo"));
    }

    #[test]
    fn the_median_is_the_middle_round() {
        let round = |ms| (Duration::from_millis(ms), 1, 1);
        assert_eq!(median(vec![round(9), round(1), round(5)]), round(5));
    }
}
