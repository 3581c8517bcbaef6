//! A server of real checkpoints on a free port, and its way down.

use std::path::{Path, PathBuf};

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use warm::app::{App, AppError, SettingsSource, Started, load_spec, loader};
use warm::client::Client;
use warm::clock::Clock;
use warm::config::{Resolved, Sources};
use warm::shutdown::Stop;

pub struct Running {
    pub client: Client,
    pub address: String,
    metrics: prometheus::Registry,
    stop: oneshot::Sender<Stop>,
    task: JoinHandle<Result<(), AppError>>,
}

impl Running {
    /// Serves the uniform average of `folders` once it is loaded.
    pub async fn start(folders: Vec<PathBuf>, settings: &[(&str, &str)]) -> Self {
        let flags = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let config = Resolved::new(Sources { flags, folders, ..Sources::default() }).expect("settings").config;
        let clock = Clock::system();
        let app = App::new(&config, clock.clone(), "test".to_owned()).expect("app");
        app.load(loader(load_spec(&config).expect("recipe"), clock), &mut |_| {}).expect("loaded");
        Self::serve(app).await
    }

    /// Serves what a configuration file names, as `warm serve --config` does, with reloads.
    pub async fn start_from(file: &Path) -> Self {
        let started = Started { file: Some(file.to_owned()), ..Started::default() };
        let resolved = started.resolve().expect("settings");
        let clock = Clock::system();
        let mut app = App::new(&resolved.config, clock.clone(), "test".to_owned()).expect("app");
        let source = SettingsSource::new(started, resolved, clock);
        app.reload_from_settings(source.clone());
        app.load(source.first(app.engine().registry().metrics().clone()), &mut |_| {}).expect("loaded");
        Self::serve(app).await
    }

    async fn serve(app: App) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("free port");
        let address = listener.local_addr().expect("address").to_string();
        let metrics = app.metrics().clone();
        let (stop, stopped) = oneshot::channel();
        let stopped = async { stopped.await.unwrap_or(Stop::Interrupt) };
        let task = tokio::spawn(async move { app.serve(listener, std::future::ready(Ok(())), stopped).await });
        let client = Client::connect(&address).await.expect("connected");
        Self { client, address, metrics, stop, task }
    }

    /// The value of one series, labels and all.
    pub fn metric(&self, series: &str) -> f64 {
        let text = prometheus::TextEncoder::new().encode_to_string(&self.metrics.gather()).expect("text");
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("no series {series} in\n{text}"))
    }

    pub async fn stopped(self) {
        drop(self.client);
        // The server may have ended already; then its result says why.
        let _ = self.stop.send(Stop::Interrupt);
        self.task.await.expect("no panic").expect("clean stop");
    }
}
