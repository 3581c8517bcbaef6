//! `warm verify`: a checkpoint, a recipe or a running server against reference scores.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::arguments::ModelArgs;
use super::{CommandError, Environment, runtime, score};
use crate::client::Client;
use crate::offline::{Golden, Scorer, Table, VerifyOptions, key_of, verify};

/// The exit code of a model that does not score as the reference does.
const DIFFERENT: u8 = 2;

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Reference scores: what tools/golden.py writes.
    #[arg(long, value_name = "FILE")]
    golden: PathBuf,
    /// Which of the file's scores are the merged model's; by default those of the only folder, `warm`, or the only ones.
    #[arg(long, value_name = "NAME")]
    key: Option<String>,
    /// Every member too, against the scores of its name.
    #[arg(long)]
    members: bool,
    /// The largest deviation of a score, as a part of it where it is above 1.
    #[arg(long, value_name = "X", default_value = "1e-4")]
    tolerance: f64,
    /// Ask a running server at this address.
    #[arg(long, value_name = "ADDR", conflicts_with = "checkpoints")]
    connect: Option<String>,
}

pub(super) fn run(arguments: VerifyArgs, environment: Environment) -> Result<ExitCode, CommandError> {
    let path = &arguments.golden;
    let bytes = std::fs::read(path).map_err(|error| CommandError::file(path, error))?;
    let golden = Golden::parse(&bytes).map_err(|error| CommandError::file(path, error))?;
    let runtime = runtime()?;
    let (scorer, members) = match &arguments.connect {
        Some(address) => {
            let client = runtime.block_on(Client::connect(address))?;
            let model = runtime.block_on(client.get_model())?;
            let members: Vec<String> = model.members.into_iter().map(|member| member.name).collect();
            (Scorer::Remote(client), members)
        }
        None => {
            let (app, spec) = score::load(arguments.model, environment, arguments.members)?;
            let members = spec.recipe.members().iter().map(|member| member.name.to_string()).collect();
            (Scorer::Engine(app.engine().clone()), members)
        }
    };
    let key = key_of(&golden, arguments.key.as_deref(), &members).map_err(|problem| CommandError::file(path, problem))?;
    let mut asked = vec![(None, key)];
    if arguments.members {
        let names = golden.names();
        asked.extend(members.into_iter().filter(|name| names.contains(&name.as_str())).map(|name| (Some(name.clone()), name)));
    }
    let mut rows = Vec::with_capacity(asked.len());
    for (member, key) in asked {
        let options = VerifyOptions { scorer: member, key, tolerance: arguments.tolerance };
        rows.push(runtime.block_on(verify(&golden, &scorer, &options))?);
    }
    let referee = golden.referee.as_deref().unwrap_or("an unnamed reference");
    println!("{} cases of {}, scored by {referee}; tolerance {:.0e}", golden.cases.len(), path.display(), arguments.tolerance);
    print!("{}", Table(&rows));
    Ok(if rows.iter().all(|row| row.passed()) { ExitCode::SUCCESS } else { ExitCode::from(DIFFERENT) })
}
