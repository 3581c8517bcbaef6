//! `warm serve`: signals and the admin port first, then the model, then requests.

use std::net::TcpListener;
use std::process::ExitCode;

use super::arguments::ModelArgs;
use super::progress::Reports;
use super::{CommandError, Environment, instance, runtime, started};
use crate::app::{App, AppError, SettingsSource, load_spec};
use crate::clock::Clock;
use crate::serve::Admin;
use crate::shutdown::{Hangups, Signals};
use crate::telemetry::{self, TraceOptions};

pub(super) fn run(arguments: ModelArgs, environment: Environment) -> Result<ExitCode, CommandError> {
    let instance = instance(&environment);
    let started = started(arguments, environment, &[]);
    let resolved = started.resolve()?;
    let config = resolved.config.clone();
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
    // Before anything is opened: a recipe that cannot be read is a mistake of whoever sits in front of it, unless what was
    // good before can take its place.
    if config.live.state.is_none() {
        load_spec(&config)?;
    }
    let clock = Clock::system();
    let source = SettingsSource::new(started, resolved, clock.clone());
    let result = runtime.block_on(async {
        let signals = Signals::listen().map_err(AppError::Thread)?;
        let mut hangups = Hangups::listen().map_err(AppError::Thread)?;
        let mut app = App::new(&config, clock.clone(), instance)?;
        let reloader = app.reload_from_settings(source.clone());
        tokio::spawn(async move {
            loop {
                hangups.next().await;
                reloader.trigger("SIGHUP");
            }
        });
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
        let first = source.first(app.engine().registry().metrics().clone());
        let loaded = app.load_in_background(first, Box::new(progress))?;
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
