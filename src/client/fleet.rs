//! A client of several servers that serve the same: each call goes to the next one in turn, and to another one where that
//! one cannot answer.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use super::{Client, ClientError};
use crate::clock::Clock;
use crate::wire;

/// How long a server that could not answer is left alone.
const REST: Duration = Duration::from_millis(500);
/// A round over all servers that could not answer is followed by this pause, and then by another round.
const PAUSE: Duration = Duration::from_millis(200);

/// Connections to several servers. They are made when they are needed and made again when they are lost, so a server may
/// come and go.
#[derive(Debug)]
pub struct Fleet {
    servers: Vec<Server>,
    next: AtomicUsize,
    clock: Clock,
}

#[derive(Debug)]
struct Server {
    address: String,
    client: Client,
    /// It could not answer, and is not asked before this.
    rests_until: Mutex<Option<Instant>>,
}

impl Fleet {
    /// Needs a tokio runtime. No connection is made yet.
    pub fn new(addresses: &[String], clock: Clock) -> Result<Self, ClientError> {
        let servers = addresses.iter().map(|address| {
            let client = Client::over(channel(address)?);
            Ok(Server { address: address.clone(), client, rests_until: Mutex::new(None) })
        });
        let servers: Vec<Server> = servers.collect::<Result<_, ClientError>>()?;
        if servers.is_empty() {
            return Err(ClientError::Address { address: String::new(), problem: "expected at least one".to_owned() });
        }
        Ok(Self { servers, next: AtomicUsize::new(0), clock })
    }

    /// Scores by the next server that can, within `timeout` over all attempts. Scoring changes nothing, so a call that a server
    /// could not answer is asked again elsewhere; so is one that names a model which that server does not serve, or not yet:
    /// while a fleet swaps its model, somebody else does.
    pub async fn score(&self, request: wire::ScoreRequest, timeout: Duration) -> Result<wire::ScoreResponse, ClientError> {
        let end = self.clock.now() + timeout;
        let pinned = request.options.as_ref().is_some_and(|options| !options.fingerprint.is_empty());
        loop {
            let (mut last, mut refusals) = (None, 0);
            for server in self.round() {
                let now = self.clock.now();
                if server.is_at_rest(now) {
                    continue;
                }
                let left = end.saturating_duration_since(now);
                if left.is_zero() {
                    break;
                }
                let mut asked = tonic::Request::new(request.clone());
                asked.set_timeout(left);
                match server.client.rewards().score(asked).await {
                    Ok(response) => return Ok(response.into_inner()),
                    // It is going, or not there: somebody else can answer. A status with a source is what became of a connection
                    // that was closed under the call, whatever its code; no server has sent it.
                    Err(status) if status.code() == Code::Unavailable || std::error::Error::source(&status).is_some() => {
                        *server.rests() = Some(self.clock.now() + REST);
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
            if refusals == self.servers.len()
                && let Some(refused) = last
            {
                return Err(refused);
            }
            let wait = self.clock.now() + PAUSE;
            if wait >= end {
                return Err(last.unwrap_or_else(|| ClientError::Connect {
                    address: self.servers.iter().map(|server| server.address.as_str()).collect::<Vec<_>>().join(", "),
                    problem: "no server answered in time".to_owned(),
                }));
            }
            self.clock.sleep_until(wait).await;
        }
    }

    /// All servers, from the next one in turn on.
    fn round(&self) -> impl Iterator<Item = &Server> {
        let (count, first) = (self.servers.len(), self.next.fetch_add(1, Ordering::Relaxed));
        (0..count).filter_map(move |i| self.servers.get((first % count + i) % count))
    }
}

impl Server {
    fn is_at_rest(&self, now: Instant) -> bool {
        self.rests().is_some_and(|until| until > now)
    }

    fn rests(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.rests_until.lock().unwrap_or_else(PoisonError::into_inner)
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
    use super::*;

    fn fleet(count: usize, clock: &Clock) -> Fleet {
        let addresses: Vec<String> = (0..count).map(|i| format!("127.0.0.1:{}", i + 1)).collect();
        Fleet::new(&addresses, clock.clone()).expect("addresses")
    }

    #[tokio::test]
    async fn servers_take_turns_and_a_call_asks_each_of_them_once_a_round() {
        let clock = Clock::manual();
        let fleet = fleet(3, &clock);
        let ports = || fleet.round().map(|server| server.address.trim_start_matches("127.0.0.1:").to_owned()).collect::<String>();
        assert_eq!([ports(), ports(), ports(), ports()], ["123", "231", "312", "123"]);
        *fleet.servers[1].rests() = Some(clock.now() + REST);
        assert_eq!(fleet.round().filter(|server| !server.is_at_rest(clock.now())).count(), 2, "one at rest is passed over");
        clock.advance(REST);
        assert!(!fleet.servers[1].is_at_rest(clock.now()), "it is asked again");
    }

    #[tokio::test]
    async fn a_fleet_of_nobody_is_refused_and_one_that_is_gone_says_so_in_time() {
        assert!(Fleet::new(&[], Clock::manual()).is_err());
        let fleet = fleet(2, &Clock::system());
        let error = fleet.score(wire::ScoreRequest::default(), Duration::from_millis(300)).await.expect_err("nobody is there");
        assert!(matches!(error.code(), None | Some("UNAVAILABLE")), "{error}");
    }
}
