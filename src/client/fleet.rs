//! A client of several servers that serve the same: each call goes to the next one in turn, and to another one where that
//! one cannot answer. Which servers there are may change: a name is looked up again while the client lives.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use super::{Client, ClientError, addresses_of};
use crate::clock::Clock;
use crate::lock::lock;
use crate::wire;

/// How long a server that could not answer is left alone.
const REST: Duration = Duration::from_millis(500);
/// A round over all servers that could not answer is followed by this pause, and then by another round.
const PAUSE: Duration = Duration::from_millis(200);
/// How often a name is looked up.
const SEARCH: Duration = Duration::from_secs(10);
/// A server that did not answer may have been replaced, so the search comes sooner, but not sooner than this after the last one.
const SOONEST: Duration = Duration::from_secs(1);

/// Connections to several servers. They are made when they are needed and made again when they are lost, so a server may
/// come and go.
#[derive(Debug)]
pub struct Fleet {
    known: Arc<Known>,
    next: AtomicUsize,
    clock: Clock,
    /// Ends with the fleet.
    search: Option<AbortHandle>,
}

/// The servers that there are.
#[derive(Debug, Default)]
struct Known {
    servers: Mutex<Arc<[Arc<Server>]>>,
    /// One of them did not answer.
    lost: Notify,
}

#[derive(Debug)]
struct Server {
    address: String,
    client: Client,
    /// It could not answer, and is not asked before this.
    rests_until: Mutex<Option<Instant>>,
}

impl Fleet {
    /// A fleet that stays as it is. Needs a tokio runtime. No connection is made yet.
    pub fn new(addresses: &[String], clock: Clock) -> Result<Self, ClientError> {
        let known = Arc::new(Known::default());
        known.take_up(addresses)?;
        Ok(Self { known, next: AtomicUsize::new(0), clock, search: None })
    }

    /// All servers that a name stands for, such as `dns:///warm-headless:50051`, now and later (see [`addresses_of`]).
    pub async fn named(name: &str, clock: Clock) -> Result<Self, ClientError> {
        let name = name.to_owned();
        let find = move || {
            let name = name.clone();
            async move { addresses_of(&name).await }
        };
        Self::found_by(find, SEARCH, clock).await
    }

    /// All servers that `find` gives the addresses of, which is asked now and then `every` so often, or sooner when a server does
    /// not answer. New ones have their turn from the next call on; calls on one that is gone end as they end. While `find` fails or
    /// finds nobody, the fleet stays as it is.
    pub async fn found_by<F>(mut find: impl FnMut() -> F + Send + 'static, every: Duration, clock: Clock) -> Result<Self, ClientError>
    where
        F: Future<Output = Result<Vec<String>, ClientError>> + Send + 'static,
    {
        let mut fleet = Self::new(&find().await?, clock.clone())?;
        let known = fleet.known.clone();
        let search = tokio::spawn(async move {
            loop {
                let last = clock.now();
                tokio::select! {
                    () = clock.sleep_until(last + every) => {}
                    () = known.lost.notified() => clock.sleep_until(last + SOONEST.min(every)).await,
                }
                if let Err(error) = find().await.and_then(|addresses| known.take_up(&addresses)) {
                    tracing::debug!(%error, "the servers stay as they are");
                }
            }
        });
        fleet.search = Some(search.abort_handle());
        Ok(fleet)
    }

    /// Scores by the next server that can, within `timeout` over all attempts. Scoring changes nothing, so a call that a server
    /// could not answer is asked again elsewhere; so is one that names a model which that server does not serve, or not yet:
    /// while a fleet swaps its model, somebody else does.
    pub async fn score(&self, request: wire::ScoreRequest, timeout: Duration) -> Result<wire::ScoreResponse, ClientError> {
        let end = self.clock.now() + timeout;
        let pinned = request.options.as_ref().is_some_and(|options| !options.fingerprint.is_empty());
        loop {
            let (mut last, mut refusals) = (None, 0);
            let round = self.round();
            for server in &round {
                let now = self.clock.now();
                if server.is_at_rest(now) {
                    continue;
                }
                let left = end.saturating_duration_since(now);
                if left.is_zero() {
                    break;
                }
                match server.client.scored(&request, Some((&self.clock, left))).await {
                    Ok(response) => return Ok(response),
                    // It is going, or not there: somebody else can answer. A status with a source is what became of a connection
                    // that was closed under the call, whatever its code; no server has sent it.
                    Err(status) if status.code() == Code::Unavailable || std::error::Error::source(&status).is_some() => {
                        *server.rests() = Some(self.clock.now() + REST);
                        self.known.lost.notify_one();
                        tracing::debug!(server = server.address, status = status.message(), "asking another server");
                        last = Some(ClientError::from(status));
                    }
                    Err(status) if pinned && status.code() == Code::FailedPrecondition => {
                        refusals += 1;
                        last = Some(ClientError::from(status));
                    }
                    Err(status) => return Err(status.into()),
                }
            }
            // Nobody serves it; waiting would not change that.
            if refusals == round.len()
                && let Some(refused) = last
            {
                return Err(refused);
            }
            let wait = self.clock.now() + PAUSE;
            if wait >= end {
                return Err(last.unwrap_or_else(|| ClientError::Connect {
                    address: round.iter().map(|server| server.address.as_str()).collect::<Vec<_>>().join(", "),
                    problem: "no server answered in time".to_owned(),
                }));
            }
            self.clock.sleep_until(wait).await;
        }
    }

    /// All servers, from the next one in turn on.
    fn round(&self) -> Vec<Arc<Server>> {
        let servers = self.known.servers();
        let first = self.next.fetch_add(1, Ordering::Relaxed) % servers.len().max(1);
        servers.iter().cycle().skip(first).take(servers.len()).cloned().collect()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if let Some(search) = &self.search {
            search.abort();
        }
    }
}

impl Known {
    fn servers(&self) -> Arc<[Arc<Server>]> {
        lock(&self.servers).clone()
    }

    /// From now on these are the servers; those that were there before keep their connections. Needs a tokio runtime.
    fn take_up(&self, addresses: &[String]) -> Result<(), ClientError> {
        let before = self.servers();
        let server = |address: &String| match before.iter().find(|server| server.address == *address) {
            Some(server) => Ok(server.clone()),
            None => {
                Ok(Arc::new(Server { address: address.clone(), client: Client::over(channel(address)?), rests_until: Mutex::new(None) }))
            }
        };
        let servers: Vec<Arc<Server>> = addresses.iter().map(server).collect::<Result<_, ClientError>>()?;
        if servers.is_empty() {
            return Err(ClientError::Address { address: String::new(), problem: "expected at least one".to_owned() });
        }
        *lock(&self.servers) = servers.into();
        Ok(())
    }
}

impl Server {
    fn is_at_rest(&self, now: Instant) -> bool {
        self.rests().is_some_and(|until| until > now)
    }

    fn rests(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        lock(&self.rests_until)
    }
}

fn channel(address: &str) -> Result<Channel, ClientError> {
    let uri = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let endpoint = Endpoint::from_shared(uri)
        .map_err(|error| ClientError::Address { address: address.to_owned(), problem: error.to_string() })?
        .connect_timeout(Duration::from_secs(2))
        .tcp_nodelay(true)
        .initial_stream_window_size(wire::STREAM_WINDOW)
        .initial_connection_window_size(wire::CONNECTION_WINDOW);
    Ok(endpoint.connect_lazy())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    fn addresses(ports: &str) -> Vec<String> {
        ports.chars().map(|port| format!("127.0.0.1:{port}")).collect()
    }

    fn ports(servers: &[Arc<Server>]) -> String {
        servers.iter().map(|server| server.address.trim_start_matches("127.0.0.1:")).collect()
    }

    #[tokio::test]
    async fn servers_take_turns_and_a_call_asks_each_of_them_once_a_round() {
        let clock = Clock::manual();
        let fleet = Fleet::new(&addresses("123"), clock.clone()).expect("addresses");
        let round = || ports(&fleet.round());
        assert_eq!([round(), round(), round(), round()], ["123", "231", "312", "123"]);
        *fleet.known.servers()[1].rests() = Some(clock.now() + REST);
        assert_eq!(fleet.round().iter().filter(|server| !server.is_at_rest(clock.now())).count(), 2, "one at rest is passed over");
        clock.advance(REST);
        assert!(!fleet.known.servers()[1].is_at_rest(clock.now()), "it is asked again");
    }

    #[tokio::test]
    async fn a_fleet_of_nobody_is_refused_and_one_that_is_gone_says_so_in_time() {
        assert!(Fleet::new(&[], Clock::manual()).is_err());
        let fleet = Fleet::new(&addresses("12"), Clock::system()).expect("addresses");
        let error = fleet.score(wire::ScoreRequest::default(), Duration::from_millis(300)).await.expect_err("nobody is there");
        assert!(matches!(error.code(), None | Some("UNAVAILABLE")), "{error}");
    }

    /// A fleet whose search finds these, one after the other, and the last one for ever; and how often it has searched.
    async fn found(answers: &[&str], clock: &Clock) -> (Fleet, Arc<AtomicUsize>) {
        let searches = Arc::new(AtomicUsize::new(0));
        let (count, mut left) = (searches.clone(), answers.iter().map(|ports| addresses(ports)).collect::<VecDeque<_>>());
        let find = move || {
            count.fetch_add(1, Ordering::Relaxed);
            let answer = if left.len() > 1 { left.pop_front() } else { left.front().cloned() };
            std::future::ready(Ok(answer.unwrap_or_default()))
        };
        (Fleet::found_by(find, SEARCH, clock.clone()).await.expect("the first search finds some"), searches)
    }

    /// Lets the search, which runs on this thread, come to where it waits.
    async fn settle() {
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn servers_that_come_are_taken_up_and_those_that_go_are_let_go() {
        let clock = Clock::manual();
        let (fleet, _) = found(&["12", "234", "", "4"], &clock).await;
        settle().await;
        let kept = fleet.known.servers()[1].clone();
        for (seen, why) in [("234", "a new name"), ("234", "nobody is found, so nobody is let go"), ("4", "two are gone")] {
            clock.advance(SEARCH);
            settle().await;
            assert_eq!(ports(&fleet.known.servers()), seen, "{why}");
            assert!(seen == "4" || Arc::ptr_eq(&kept, &fleet.known.servers()[0]), "who stays keeps its connection");
        }
    }

    #[tokio::test]
    async fn a_server_that_is_lost_is_searched_for_at_once_but_not_without_end() {
        let clock = Clock::manual();
        let (fleet, searches) = found(&["1"], &clock).await;
        settle().await;
        for lost in 1..4 {
            // Many calls lose it together.
            (0..10).for_each(|_| fleet.known.lost.notify_one());
            settle().await;
            assert_eq!(searches.load(Ordering::Relaxed), lost, "not before a second is over");
            clock.advance(SOONEST);
            settle().await;
            assert_eq!(searches.load(Ordering::Relaxed), lost + 1);
        }
        drop(fleet);
        clock.advance(SEARCH);
        settle().await;
        assert_eq!(searches.load(Ordering::Relaxed), 4, "the search ends with the fleet");
    }

    #[tokio::test]
    async fn a_name_is_looked_up() {
        let fleet = Fleet::named("dns:///127.0.0.1:2,127.0.0.1:1", Clock::manual()).await.expect("addresses");
        assert_eq!(ports(&fleet.round()), "12");
        assert!(Fleet::named("dns:///", Clock::manual()).await.is_err());
    }
}
