//! `warm score` and `warm explain`: the same scoring without a network.

use std::io::{self, BufRead};
use std::process::ExitCode;

use clap::Args;

use super::arguments::ModelArgs;
use super::lines::{InputArgs, OutputArgs};
use super::progress::Reports;
use super::{CommandError, Environment, instance, resolve, runtime};
use crate::app::{App, load_spec, loader};
use crate::client::Client;
use crate::clock::Clock;
use crate::offline::{self, Input, Scorer};
use crate::registry::{CallOptions, open_text};
use crate::scorer::Permit;
use crate::telemetry;

#[derive(Debug, Args)]
pub(super) struct ScoreArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    input: InputArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// Every member's reward beside the merged model's.
    #[arg(long)]
    members: bool,
    /// Score through a running server at this address.
    #[arg(long, value_name = "ADDR", conflicts_with = "checkpoints")]
    connect: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The first line is what is explained.
    #[command(flatten)]
    input: InputArgs,
}

pub(super) fn run(arguments: ScoreArgs, environment: Environment) -> Result<ExitCode, CommandError> {
    let options = offline::ScoreOptions { truncation: arguments.input.truncation(), members: arguments.members };
    let (input, output) = (arguments.input.open()?, arguments.output.create()?);
    let runtime = runtime()?;
    let scorer = match &arguments.connect {
        Some(address) => Scorer::Remote(runtime.block_on(Client::connect(address))?),
        None => Scorer::Engine(load(arguments.model, environment, arguments.members)?.0.engine().clone()),
    };
    let summary = runtime.block_on(offline::score_lines(input, output, &scorer, options))?;
    eprintln!("{} lines, {} scores, {} failures, {} tokens", summary.lines, summary.scored, summary.failed, summary.tokens);
    Ok(ExitCode::SUCCESS)
}

pub(super) fn explain(arguments: ExplainArgs, environment: Environment) -> Result<ExitCode, CommandError> {
    let truncation = arguments.input.truncation();
    let mut line = String::new();
    // One line is one input; more than a message may have is not read.
    let mut input = io::Read::take(arguments.input.open()?, 64 << 20);
    input.read_line(&mut line).map_err(|error| CommandError::file(&arguments.input.input, error))?;
    let item = offline::parse_line(&line).map_err(|error| CommandError::Other(format!("line 1: {error}")))?;
    let samples = match item.input {
        Input::One(sample) => vec![sample],
        Input::Group(group) => group.samples().collect(),
        Input::Preference(pair) => vec![pair.chosen, pair.rejected],
    };
    let (app, spec) = load(arguments.model, environment, false)?;
    let (_, text, _) = open_text(&spec, &Clock::system(), &mut |_, _, _| {}).map_err(|error| CommandError::Other(error.to_string()))?;
    let call = CallOptions { truncation, details: true, ..CallOptions::default() };
    let engine = app.engine();
    let reply = runtime()?.block_on(engine.score(samples.clone(), call, Permit::unlimited()));
    let reply = reply.map_err(offline::OfflineError::from)?;
    let mut out = io::stdout().lock();
    for (sample, outcome) in samples.iter().zip(&reply.outcomes) {
        offline::explain(&mut out, &text, sample, truncation, outcome.as_ref()).map_err(offline::OfflineError::Write)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The model of a command without a server, with progress on standard error.
pub(super) fn load(
    arguments: ModelArgs,
    environment: Environment,
    members: bool,
) -> Result<(App, crate::registry::LoadSpec), CommandError> {
    let instance = instance(&environment);
    // Streamed members are members, too.
    let given = arguments.settings.0.iter().any(|(key, _)| key == "ensemble");
    let more: &[(&str, &str)] = if members && !given { &[("ensemble", "resident")] } else { &[] };
    let config = resolve(arguments, environment, more)?.config;
    telemetry::start(config.log_format, &config.log_filter)?;
    let spec = load_spec(&config)?;
    let clock = Clock::system();
    let app = App::new(&config, clock.clone(), instance)?;
    let mut reports = Reports::new(clock.clone());
    app.load(loader(spec.clone(), clock), &mut |progress| {
        if let Some(words) = reports.say(&progress) {
            eprintln!("{words}");
        }
    })?;
    Ok((app, spec))
}
