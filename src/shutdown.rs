//! Signals. The first one asks the server to stop, a second one ends the process at once.

use std::io;

use tokio::sync::mpsc;

/// How a server is asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// SIGTERM: other servers take over, and the news needs time to spread.
    Terminate,
    /// SIGINT: somebody sits in front of it.
    Interrupt,
}

/// The signals of this process, listened for from when this is made, so that one that arrives during a long load is seen.
#[derive(Debug)]
pub struct Signals(mpsc::UnboundedReceiver<Stop>);

/// SIGHUP, which asks for a reload.
#[derive(Debug)]
pub struct Hangups(#[cfg(unix)] tokio::signal::unix::Signal);

impl Hangups {
    /// Installs the handler, so that the signal does not end the process any more. Needs a tokio runtime.
    #[cfg(unix)]
    pub fn listen() -> io::Result<Self> {
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()).map(Self)
    }

    /// There is no such signal here.
    #[cfg(not(unix))]
    pub fn listen() -> io::Result<Self> {
        Ok(Self())
    }

    /// Completes with the next one.
    pub async fn next(&mut self) {
        #[cfg(unix)]
        if self.0.recv().await.is_some() {
            return;
        }
        std::future::pending().await
    }
}

/// The exit code after a second signal: 128 and the number of SIGINT, as shells say it.
const EXIT_AT_ONCE: i32 = 130;

#[cfg(unix)]
struct Source {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Source {
    fn install() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> Stop {
        tokio::select! {
            _ = self.terminate.recv() => Stop::Terminate,
            _ = self.interrupt.recv() => Stop::Interrupt,
        }
    }
}

#[cfg(not(unix))]
struct Source;

#[cfg(not(unix))]
impl Source {
    fn install() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> Stop {
        if tokio::signal::ctrl_c().await.is_err() {
            // Without a handler there is nothing to wait for.
            std::future::pending::<()>().await;
        }
        Stop::Interrupt
    }
}

impl Signals {
    /// Installs the handlers. Needs a tokio runtime.
    pub fn listen() -> io::Result<Self> {
        let mut source = Source::install()?;
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            // Nobody listening means that the process is on its way out already.
            let _ = sender.send(source.next().await);
            source.next().await;
            tracing::warn!("second signal, exiting at once");
            std::process::exit(EXIT_AT_ONCE);
        });
        Ok(Self(receiver))
    }

    /// The first signal.
    pub async fn first(mut self) -> Stop {
        match self.0.recv().await {
            Some(stop) => stop,
            // The task that listens is gone only when the runtime is.
            None => std::future::pending().await,
        }
    }
}
