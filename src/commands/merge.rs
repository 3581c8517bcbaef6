//! `warm merge`: a recipe to a checkpoint on disk.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use serde_json::json;

use super::arguments::RecipeArgs;
use super::progress::Reports;
use super::{CommandError, EXIT_INTERRUPTED, Environment, runtime};
use crate::clock::Clock;
use crate::config::parse_size;
use crate::merge::{Merged, WriteError, WriteOptions, Written, write_checkpoint, written_before};
use crate::registry::Progress;
use crate::shutdown::Signals;

#[derive(Debug, Args)]
pub(super) struct MergeArgs {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The folder that the checkpoint is written to; it appears when all is written.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace a checkpoint that stands there.
    #[arg(long)]
    overwrite: bool,
    /// Leave a merge of the same recipe that stands there, members at the same commits, and end well; without downloading.
    #[arg(long, conflicts_with = "overwrite")]
    if_absent: bool,
    /// The largest file of weights; a larger tensor gets a file of its own.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    max_shard_size: usize,
    /// What was written, as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: MergeArgs, environment: &Environment) -> Result<ExitCode, CommandError> {
    let remotes = arguments.recipe.remotes(environment)?;
    let options = WriteOptions { overwrite: arguments.overwrite, max_shard_bytes: arguments.max_shard_size as u64 };
    // A first signal ends the merge between two chunks, so that it can take its files with it; a second one is not waited for.
    // Before there are such files it ends the process: what was downloaded stays, and is gone on with.
    let runtime = runtime()?;
    let (writing, interrupted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (begun, seen) = (Arc::clone(&writing), Arc::clone(&interrupted));
    runtime.block_on(async move {
        let signals = Signals::listen().map_err(|error| CommandError::Other(format!("signals cannot be listened for: {error}")))?;
        tokio::spawn(async move {
            signals.first().await;
            seen.store(true, Ordering::SeqCst);
            if !begun.load(Ordering::SeqCst) {
                eprintln!("error: {}", WriteError::Interrupted);
                std::process::exit(i32::from(EXIT_INTERRUPTED));
            }
        });
        Ok::<_, CommandError>(())
    })?;
    if arguments.if_absent
        && let Some(weights_id) = written_before(&arguments.recipe.resolve()?, &arguments.out, &remotes)?
    {
        println!("{}", describe_present(&weights_id, &arguments));
        return Ok(ExitCode::SUCCESS);
    }
    let plan = Arc::new(arguments.recipe.plan(&remotes)?);
    if !arguments.json {
        eprintln!("{plan}");
    }
    let mut reports = Reports::new(Clock::system());
    let mut tell = |done, total| {
        if let Some(words) = reports.say(&Progress { stage: "merge".to_owned(), done, total }) {
            eprintln!("{words}");
        }
        if interrupted.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    // SLERP reads all members here for their angles, and again when it writes.
    let merged = Merged::new(plan).map_err(WriteError::from)?;
    for note in merged.notes() {
        eprintln!("note: {note}");
    }
    if let Some(parent) = arguments.out.parent() {
        std::fs::create_dir_all(parent).map_err(|error| CommandError::file(parent, error))?;
    }
    writing.store(true, Ordering::SeqCst);
    match write_checkpoint(&merged, &arguments.out, options, &mut tell) {
        Ok(written) => {
            println!("{}", describe(&written, &arguments));
            Ok(ExitCode::SUCCESS)
        }
        Err(WriteError::Interrupted) => {
            eprintln!("error: {}", WriteError::Interrupted);
            Ok(ExitCode::from(EXIT_INTERRUPTED))
        }
        Err(error) => Err(error.into()),
    }
}

fn describe_present(weights_id: &str, arguments: &MergeArgs) -> String {
    let out = &arguments.out;
    if arguments.json {
        return json!({"out": out.to_string_lossy(), "weights_id": weights_id, "written": false}).to_string();
    }
    format!("{}: the merge of this recipe stands there already\nweights_id {weights_id}", out.display())
}

fn describe(written: &Written, arguments: &MergeArgs) -> String {
    let Written { weights_id, files, tensors, bytes } = written;
    if arguments.json {
        return json!({
            "out": arguments.out.to_string_lossy(),
            "weights_id": weights_id.to_string(),
            "written": true,
            "files": files,
            "tensors": tensors,
            "bytes": bytes,
        })
        .to_string();
    }
    let out = arguments.out.display();
    format!("{out}: {tensors} tensors, {bytes} bytes in {}\nweights_id {weights_id}", files.join(", "))
}
