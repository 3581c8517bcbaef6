//! `warm compare` and `warm calibrate`: the merged model beside its members, on lines of JSON.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::arguments::ModelArgs;
use super::lines::{InputArgs, OutputArgs};
use super::score::load;
use super::{CommandError, Environment, runtime};
use crate::app::calibration::{CalibrationFile, MemberNumbers, numbers};
use crate::client::Client;
use crate::domain::MemberScale;
use crate::offline::{self, CompareLines, Measured, Scorer};
use crate::registry::{CompareOptions, Generation};

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Scale {
    /// As the heads give them.
    Raw,
    /// Less the mean of each model.
    Centered,
    /// Less the mean, divided by the standard deviation of each model.
    Standardized,
}

#[derive(Debug, Args)]
pub(super) struct CompareArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    input: InputArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// Show a table of so many samples, those in which merged model and ensemble differ most.
    #[arg(long, value_name = "N", default_value_t = 0)]
    top: usize,
    /// The unit of rewards; other than raw needs a calibration of each model.
    #[arg(long, value_name = "UNIT", default_value = "raw")]
    member_scale: Scale,
    /// The weight of the variance in `uwo`.
    #[arg(long, value_name = "X")]
    uwo_lambda: Option<f64>,
    /// Compare with this member, by name; may be given again. Without it: all.
    #[arg(long = "member", value_name = "NAME")]
    members: Vec<String>,
    /// Compare through a running server at this address.
    #[arg(long, value_name = "ADDR", conflicts_with = "checkpoints")]
    connect: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct CalibrateArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    input: InputArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// What the reference set is, for people; without it: the name of the input.
    #[arg(long, value_name = "TEXT")]
    source: Option<String>,
}

pub(super) fn run(arguments: CompareArgs, environment: Environment) -> Result<ExitCode, CommandError> {
    let scale = match arguments.member_scale {
        Scale::Raw => MemberScale::Raw,
        Scale::Centered => MemberScale::Centered,
        Scale::Standardized => MemberScale::Standardized,
    };
    let compare = CompareOptions { members: arguments.members, uwo_lambda: arguments.uwo_lambda, scale };
    let options = CompareLines { truncation: arguments.input.truncation(), compare, top: arguments.top };
    let (input, output) = (arguments.input.open()?, arguments.output.create()?);
    let runtime = runtime()?;
    let scorer = match &arguments.connect {
        Some(address) => Scorer::Remote(runtime.block_on(Client::connect(address))?),
        None => Scorer::Engine(load(arguments.model, environment, true)?.0.engine().clone()),
    };
    let compared = runtime.block_on(offline::compare_lines(input, output, &scorer, options))?;
    // Standard output is for the lines, unless they went into a file.
    if arguments.output.is_standard_output() {
        eprint!("{compared}")
    } else {
        print!("{compared}")
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn calibrate(arguments: CalibrateArgs, environment: Environment) -> Result<ExitCode, CommandError> {
    let input = arguments.input.open()?;
    let name = arguments.input.input.file_name().map_or_else(|| "-".to_owned(), |name| name.to_string_lossy().into_owned());
    let source = arguments.source.unwrap_or(name);
    let runtime = runtime()?;
    let (app, _) = load(arguments.model, environment, true)?;
    let engine = app.engine();
    let scorer = Scorer::Engine(engine.clone());
    let measured = runtime.block_on(offline::measure_lines(input, &scorer, arguments.input.truncation()))?;
    let live = engine.registry().current().ok_or_else(|| CommandError::Other("no model is loaded".to_owned()))?;
    let file = calibration(&measured, &live, source).map_err(CommandError::Other)?;
    let text = serde_json::to_string_pretty(&file).map_err(|error| CommandError::Other(error.to_string()))?;
    let mut output = arguments.output.create()?;
    let written = writeln!(output, "{text}").and_then(|()| output.flush());
    written.map_err(|error| CommandError::file(&arguments.output.output, error))?;
    eprintln!("{} samples, {} failures: mean {:.4}, std {:.4}", file.samples, measured.failed, file.mean, file.std);
    Ok(ExitCode::SUCCESS)
}

fn calibration(measured: &Measured, live: &Generation, source: String) -> Result<CalibrationFile, String> {
    let (mean, std) = numbers("the merged model", &measured.merged)?;
    let mut members = BTreeMap::new();
    for (name, moments) in &measured.members {
        let (mean, std) = numbers(&format!("member {name}"), moments)?;
        let info = live.info.members.iter().find(|member| member.name.as_str() == name);
        let content_hash = info.map(|member| member.content_hash.clone());
        members.insert(name.clone(), MemberNumbers { mean, std, samples: moments.count(), content_hash });
    }
    Ok(CalibrationFile { mean, std, samples: measured.merged.count(), source, weights_id: Some(live.weights_id.to_string()), members })
}
