//! `warm health`: a probe for shells and containers.

use std::process::ExitCode;

use super::{CommandError, runtime};
use crate::client::Client;

#[derive(Debug, clap::Args)]
pub(super) struct HealthArgs {
    /// Where the server listens.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:50051")]
    addr: String,
    /// The service to ask for; empty for the whole server.
    #[arg(long, value_name = "NAME", default_value = "")]
    service: String,
}

pub(super) fn run(arguments: &HealthArgs) -> Result<ExitCode, CommandError> {
    let serving = runtime()?.block_on(async { Client::connect(&arguments.addr).await?.is_serving(&arguments.service).await })?;
    println!("{}", if serving { "serving" } else { "not serving" });
    Ok(if serving { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
