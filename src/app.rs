//! Assembly: settings to a running server, and its way down. The listener and the wish to stop are parameters, so that
//! tests use port 0 and no signals.

pub mod calibration;
mod device_memory;
mod free_memory;
mod last_good;
mod loading;
mod memory;
mod packs;
mod reloading;
mod watching;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use prometheus::IntGauge;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::clock::Clock;
use crate::config::{Config, ConfigError, LiveConfig};
use crate::domain::GenerationId;
use crate::model::Place;
use crate::registry::{
    Engine, EngineOptions, EngineParts, Generation, Progress, Registry, RegistryMetrics, ReloadEvent, ReloadOptions, ReloadOutcome,
    Reloader, Source, Swap, Watch, WatchOptions,
};
use crate::scorer::{Admission, AdmissionOptions, ScorerMetrics, ScorerOptions};
use crate::serve::convert::ConvertLimits;
use crate::serve::tenants::NONE as NO_TENANT;
use crate::serve::{AdminError, CallBook, CallLogOptions, Edge, GrpcOptions, Phase, Readiness, ServeError, ServeMetrics, Tenants};
use crate::shutdown::Stop;

use device_memory::DeviceMemory;
pub use loading::{load_spec, loader, remotes, with_causes};
pub use memory::limit as memory_limit;
pub use reloading::{SettingsError, SettingsSource, Started, missing};
use watching::FileWatch;

/// Why the program cannot do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error("{place}: {problem}")]
    Config { place: String, problem: String },
    #[error("the model cannot be loaded: {0}")]
    Load(String),
    #[error("cannot listen on {address}: {problem}")]
    Listen { address: String, problem: String },
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("a thread cannot be started: {0}")]
    Thread(#[from] std::io::Error),
    #[error("a device is lost, or its worker has ended: nothing is scored until the process starts anew")]
    DeviceLost,
}

impl From<ConfigError> for AppError {
    fn from(error: ConfigError) -> Self {
        Self::Config { place: error.place, problem: error.problem }
    }
}

/// Makes the generation of this number, telling how far it has come.
pub type Loader = Box<dyn FnOnce(GenerationId, &mut dyn FnMut(Progress)) -> Result<Generation, String> + Send>;

/// Everything but the sockets: built at once, and empty until a generation is loaded.
pub struct App {
    engine: Engine,
    admission: Admission,
    readiness: Readiness,
    metrics: prometheus::Registry,
    calls: CallBook,
    grpc: GrpcOptions,
    reloads: ReloadOptions,
    live: LiveConfig,
    /// The devices that hold the models.
    places: Vec<Place>,
    /// How large packs may be is measured once a model is there.
    packs: Option<packs::Measure>,
    reloader: Option<Reloader>,
    /// What the files to watch are asked from.
    watched: Option<SettingsSource>,
    drain_delay: Duration,
    drain_deadline: Duration,
}

impl App {
    /// Starts the device worker and the pool that encodes. `instance` names this process in every answer.
    pub fn new(config: &Config, clock: Clock, instance: String) -> Result<Self, AppError> {
        let metrics = prometheus::Registry::new();
        #[cfg(target_os = "linux")]
        metrics.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let scorer_metrics = ScorerMetrics::register(&metrics)?;
        let live = config.live.clone();
        // What is replaced in place cannot be held.
        let keep = if live.swap == Swap::InPlace { 0 } else { live.keep };
        let registry = Registry::new(RegistryMetrics::register(&metrics)?, keep);
        let places = config
            .device
            .resolve()
            .map_err(|error| AppError::Config { place: format!("device {}", error.place), problem: error.problem })?;
        let admission = Admission::new(
            AdmissionOptions {
                max_requests: config.admission.max_requests,
                max_bytes: config.admission.max_bytes as u64,
                max_tokens: config.admission.max_tokens as u64,
                retry_after: config.admission.retry_after,
                devices: places.len(),
            },
            scorer_metrics.clone(),
        );
        let scorer_options = ScorerOptions {
            devices: places.len(),
            max_pack_tokens: packs::most(config),
            max_queue_samples: config.admission.max_queue,
            threads: threads_per_device(config.threads, places.len()),
            nice: config.nice,
            retry_after: config.admission.retry_after,
            ..ScorerOptions::default()
        };
        // The workers' threads end by themselves when the last handle goes.
        let (scorer, _workers) = crate::scorer::spawn(scorer_options, clock.clone(), scorer_metrics)?;
        let engine_options = EngineOptions { instance, tokenizer_threads: config.threads.unwrap_or(0), ..EngineOptions::default() };
        let tenants = Arc::new(Tenants::new(&config.tenants));
        let watch_options = WatchOptions {
            shadow_share: live.shadow_share,
            max_tokens_per_second: live.shadow_tokens_per_second as f64,
            tenants: std::iter::once(NO_TENANT.to_owned()).chain(tenants.names()).collect(),
        };
        let watch = Watch::new(&watch_options, clock.clone())?;
        metrics.register(Box::new(watch.clone()))?;
        let engine = Engine::new(EngineParts { registry, scorer, clock, watch: Some(watch) }, engine_options)?;
        metrics.register(Box::new(DeviceMemory::new(&places)?))?;
        let memory_limit = IntGauge::new("warm_app_memory_limit_bytes", "Bytes of memory that this process may use; 0 where nobody says.")?;
        metrics.register(Box::new(memory_limit.clone()))?;
        memory_limit.set(i64::try_from(memory::limit()).unwrap_or(i64::MAX));
        let serve_metrics = ServeMetrics::register(&metrics)?;
        let log = CallLogOptions { successes: config.log_successes, content: config.log_content };
        let calls = CallBook::new(engine.clock().clone(), serve_metrics, engine.registry().recent().clone(), tenants, log);
        let grpc = GrpcOptions {
            max_decode: config.message.max_decode,
            max_encode: config.message.max_encode,
            limits: ConvertLimits::new(config.message.max_samples, config.message.max_expanded, config.admission.max_tokens),
            stream_window: config.stream_window,
            keepalive_interval: config.keepalive_interval,
            keepalive_timeout: config.keepalive_timeout,
            max_connection_age: config.max_connection_age,
        };
        let readiness = Readiness::default();
        let (drain_delay, drain_deadline) = (config.drain_delay, config.drain_deadline);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let reloads = ReloadOptions {
            swap: live.swap,
            activation: live.activation,
            drain: drain_deadline,
            // A load may take a while; the requests may not.
            threads: (cores / 4).max(1),
        };
        let packs = config.max_pack_tokens.is_none().then(|| packs::Measure {
            places: places.clone(),
            most: packs::most(config),
            prefix_cache: config.prefix_cache_bytes as u64,
            swap: live.swap,
        });
        let (reloader, watched) = (None, None);
        Ok(Self {
            engine,
            admission,
            readiness,
            metrics,
            calls,
            grpc,
            reloads,
            live,
            places,
            packs,
            reloader,
            watched,
            drain_delay,
            drain_deadline,
        })
    }

    /// Takes further generations from `source`, for calls and signals. Needs a tokio runtime.
    pub fn reload_from(&mut self, source: Arc<dyn Source>) -> Reloader {
        let places = self.places.clone();
        let free = Box::new(move || free_memory::free_on(&places));
        let reloader = Reloader::new(self.engine.clone(), source, self.reloads, free, tokio::runtime::Handle::current());
        if let Some(packs) = self.packs.clone() {
            reloader.fit_packs(Box::new(move |generation, others| packs.measured(generation, others)));
        }
        self.reloader = Some(reloader.clone());
        reloader
    }

    /// Takes further generations from the settings, and watches their files where the settings say so.
    pub fn reload_from_settings(&mut self, source: SettingsSource) -> Reloader {
        self.watched = Some(source.clone());
        self.reload_from(Arc::new(source))
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    pub fn metrics(&self) -> &prometheus::Registry {
        &self.metrics
    }

    /// Loads the first generation on this thread and makes it the live one.
    pub fn load(&self, load: Loader, progress: &mut dyn FnMut(Progress)) -> Result<(), AppError> {
        install(&self.engine, self.packs.as_ref(), load, progress)
    }

    /// Loads the first generation on a thread of its own, so that the runtime answers meanwhile.
    pub fn load_in_background(
        &self,
        load: Loader,
        mut progress: Box<dyn FnMut(Progress) + Send>,
    ) -> Result<impl Future<Output = Result<(), AppError>> + use<>, AppError> {
        let (done, loaded) = oneshot::channel();
        let (engine, packs) = (self.engine.clone(), self.packs.clone());
        let run = move || {
            // A server that is stopped during the load does not wait for the answer.
            let _ = done.send(install(&engine, packs.as_ref(), load, &mut *progress));
        };
        std::thread::Builder::new().name("warm-load".to_owned()).spawn(run)?;
        Ok(async move { loaded.await.unwrap_or_else(|_| Err(AppError::Load("the loading thread panicked".to_owned()))) })
    }

    /// Serves on `listener`, from before the model is loaded (UNAVAILABLE until then) until `stop`, and then drains: not
    /// ready, keep serving for the delay, refuse what is new, and let what is in flight end within its deadline.
    pub async fn serve(
        &self,
        listener: TcpListener,
        loaded: impl Future<Output = Result<(), AppError>>,
        stop: impl Future<Output = Stop>,
    ) -> Result<(), AppError> {
        let (close, closed) = oneshot::channel::<()>();
        let edge = Edge {
            engine: self.engine.clone(),
            admission: self.admission.clone(),
            reloader: self.reloader.clone(),
            readiness: self.readiness.clone(),
            calls: self.calls.clone(),
            options: self.grpc.clone(),
        };
        let mut server = tokio::spawn(crate::serve::serve(edge, listener, async move { drop(closed.await) }));
        let mut stop = std::pin::pin!(stop);
        tokio::select! {
            result = loaded => result?,
            ended = &mut server => return server_ended(ended),
            _ = &mut stop => {
                tracing::info!("stopped while loading");
                return Ok(());
            }
        }
        self.readiness.advance(Phase::Ready);
        tracing::info!("ready");
        let _files = self.keep_up_to_date()?;
        // Ends with this function.
        let mut shadow = tokio::task::JoinSet::new();
        if let Some(watch) = self.engine.watch() {
            shadow.spawn(watch.clone().shadow(self.engine.clone()));
        }
        let mut live = self.engine.registry().watch();
        let stop = loop {
            tokio::select! {
                ended = &mut server => return server_ended(ended),
                stop = &mut stop => break stop,
                Ok(()) = live.changed() => self.readiness.pause(live.borrow_and_update().is_none()),
                () = self.engine.scorer().ended() => {
                    self.give_up(close, server).await;
                    return Err(AppError::DeviceLost);
                }
            }
        };
        self.readiness.advance(Phase::Draining);
        let clock = self.engine.clock();
        if stop == Stop::Terminate && !self.drain_delay.is_zero() {
            tracing::info!(seconds = self.drain_delay.as_secs_f64(), "not ready any more, still serving");
            clock.sleep_until(clock.now() + self.drain_delay).await;
        }
        self.admission.drain();
        self.readiness.advance(Phase::Stopping);
        let in_flight = self.admission.in_flight();
        tracing::info!(in_flight = *in_flight.borrow(), "refusing new requests, finishing those in flight");
        drop(close);
        tokio::select! {
            ended = &mut server => server_ended(ended)?,
            () = clock.sleep_until(clock.now() + self.drain_deadline) => {
                tracing::warn!(in_flight = *in_flight.borrow(), "the drain deadline has passed, connections are cut");
                server.abort();
            }
        }
        tracing::info!("stopped");
        Ok(())
    }
}

/// How long callers may take to hear that nothing is scored any more.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl App {
    /// Refuses what is new, and lets those who wait hear that they wait in vain.
    async fn give_up(&self, close: oneshot::Sender<()>, mut server: tokio::task::JoinHandle<Result<(), ServeError>>) {
        tracing::error!("a device is lost: the process ends, so that it can be started anew");
        self.readiness.advance(Phase::Stopping);
        self.admission.drain();
        drop(close);
        let clock = self.engine.clock();
        tokio::select! {
            _ = &mut server => {}
            () = clock.sleep_until(clock.now() + LAST_WORDS) => server.abort(),
        }
    }

    /// What sets off reloads by itself, once the first generation is live.
    fn keep_up_to_date(&self) -> Result<Option<FileWatch>, AppError> {
        let Some(reloader) = &self.reloader else { return Ok(None) };
        if self.watched.as_ref().is_some_and(SettingsSource::came_back) {
            reloader.trigger("start");
        }
        let (Some(options), Some(source)) = (self.live.watch.clone(), self.watched.clone()) else { return Ok(None) };
        let reloader = reloader.clone();
        let changed = move || reloader.trigger("changed files");
        Ok(Some(FileWatch::start(options, self.engine.clock().clone(), move || source.watched(), changed)?))
    }
}

/// The workers share the threads that one would have; 0 is one per core.
fn threads_per_device(threads: Option<usize>, devices: usize) -> usize {
    if devices <= 1 {
        return threads.unwrap_or(0);
    }
    let all = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
    (all / devices).max(1)
}

fn install(engine: &Engine, packs: Option<&packs::Measure>, load: Loader, progress: &mut dyn FnMut(Progress)) -> Result<(), AppError> {
    let registry = engine.registry();
    // A load is a trace of its own.
    let span = tracing::debug_span!("load", fingerprint = tracing::field::Empty, members = tracing::field::Empty);
    let _load = span.enter();
    match load(registry.next_id(), progress) {
        Ok(generation) => {
            for note in &generation.info.notes {
                tracing::warn!(note, "about the model");
            }
            let info = &generation.info;
            span.record("fingerprint", tracing::field::display(generation.fingerprint));
            span.record("members", info.members.len());
            tracing::info!(
                fingerprint = %generation.fingerprint,
                architecture = %info.architecture,
                members = info.members.len(),
                dtype = %info.dtype,
                devices = info.devices.join(", "),
                "loaded"
            );
            if let Some(packs) = packs {
                let tokens = packs.measured(&generation, 0);
                generation.set_pack_tokens(tokens);
                engine.scorer().set_max_pack_tokens(tokens);
            }
            registry.metrics().reloaded(ReloadOutcome::Loaded);
            let (at, fingerprint) = (engine.clock().wall(), Some(generation.fingerprint));
            registry.recent().reloaded(ReloadEvent { at, outcome: ReloadOutcome::Loaded, fingerprint, problem: None });
            drop(registry.install(generation));
            Ok(())
        }
        Err(problem) => {
            registry.metrics().reloaded(ReloadOutcome::Failed);
            let (at, words) = (engine.clock().wall(), Some(problem.clone()));
            registry.recent().reloaded(ReloadEvent { at, outcome: ReloadOutcome::Failed, fingerprint: None, problem: words });
            Err(AppError::Load(problem))
        }
    }
}

fn server_ended(ended: Result<Result<(), ServeError>, tokio::task::JoinError>) -> Result<(), AppError> {
    match ended {
        Ok(result) => Ok(result?),
        Err(panic) => Err(AppError::Listen { address: "the gRPC server".to_owned(), problem: panic.to_string() }),
    }
}

#[cfg(test)]
mod tests;
