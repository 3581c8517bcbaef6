//! `warm serve`: signals and the admin port first, then the model, then requests.

use std::net::TcpListener;
use std::process::ExitCode;

use super::arguments::ModelArgs;
use super::progress::Reports;
use super::{CommandError, Environment, instance, resolve, runtime};
use crate::app::{App, AppError, load_spec, loader};
use crate::clock::Clock;
use crate::serve::Admin;
use crate::shutdown::Signals;
use crate::telemetry::{self, TraceOptions};

pub(super) fn run(arguments: ModelArgs, environment: Environment) -> Result<ExitCode, CommandError> {
    let instance = instance(&environment);
    let config = resolve(arguments, environment, &[])?.config;
    let runtime = runtime()?;
    let traces = config.traces_endpoint.clone().map(|endpoint| {
        let (share, instance) = (config.traces_share, instance.clone());
        TraceOptions { endpoint, share, instance }
    });
    let telemetry = {
        // What is exported is sent by the runtime.
        let _inside = runtime.enter();
        telemetry::start_with(config.log_format, &config.log_filter, traces.as_ref())?
    };
    let spec = load_spec(&config)?;
    let clock = Clock::system();
    let result = runtime.block_on(async {
        let signals = Signals::listen().map_err(AppError::Thread)?;
        let app = App::new(&config, clock.clone(), instance)?;
        let listen = |address: std::net::SocketAddr, error: std::io::Error| AppError::Listen {
            address: address.to_string(),
            problem: error.to_string(),
        };
        let admin = TcpListener::bind(config.admin_listen).map_err(|error| listen(config.admin_listen, error))?;
        let admin = Admin::start(admin, app.readiness().clone(), app.metrics().clone(), app.engine().clone()).map_err(AppError::from)?;
        let listener = tokio::net::TcpListener::bind(config.listen).await.map_err(|error| listen(config.listen, error))?;
        let address = listener.local_addr().map_err(|error| listen(config.listen, error))?;
        tracing::info!(grpc = %address, admin = %admin.address(), "listening, loading the model");
        let mut reports = Reports::new(clock.clone());
        let progress = move |progress: crate::registry::Progress| {
            if let Some(words) = reports.say(&progress) {
                tracing::info!("{words}");
            }
        };
        let loaded = app.load_in_background(loader(spec, clock.clone()), Box::new(progress))?;
        app.serve(listener, loaded, signals.first()).await?;
        // Probes answer until the very end.
        drop(admin);
        Ok::<_, CommandError>(())
    });
    telemetry.stop();
    // What was cut at the deadline is not waited for again.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}
