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
    /// could not answer is asked again elsewhere.
    pub async fn score(&self, request: wire::ScoreRequest, timeout: Duration) -> Result<wire::ScoreResponse, ClientError> {
        let end = self.clock.now() + timeout;
        loop {
            let mut last = None;
            for _ in 0..self.servers.len() {
                let now = self.clock.now();
                let Some(server) = self.turn(now) else { break };
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
                    Err(status) => return Err(status.into()),
                }
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

    /// The next server in turn that is not at rest.
    fn turn(&self, now: Instant) -> Option<&Server> {
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let in_turn = (0..self.servers.len()).filter_map(|i| self.servers.get((first + i) % self.servers.len()));
        in_turn.into_iter().find(|server| server.rests().is_none_or(|until| until <= now))
    }
}

impl Server {
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
        .http2_adaptive_window(true);
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
    async fn servers_take_turns_and_one_at_rest_is_passed_over() {
        let clock = Clock::manual();
        let fleet = fleet(3, &clock);
        let turn = || fleet.turn(clock.now()).map(|server| server.address.as_str());
        assert_eq!(
            [turn(), turn(), turn(), turn()].map(Option::unwrap_or_default),
            ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:1"]
        );
        *fleet.servers[1].rests() = Some(clock.now() + REST);
        let passed: Vec<_> = (0..6).filter_map(|_| turn()).collect();
        assert!(!passed.contains(&"127.0.0.1:2"), "{passed:?}");
        clock.advance(REST);
        assert!((0..3).filter_map(|_| turn()).any(|address| address == "127.0.0.1:2"), "it is asked again");
    }

    #[tokio::test]
    async fn a_fleet_of_nobody_is_refused_and_one_that_is_gone_says_so_in_time() {
        assert!(Fleet::new(&[], Clock::manual()).is_err());
        let fleet = fleet(2, &Clock::system());
        let error = fleet.score(wire::ScoreRequest::default(), Duration::from_millis(300)).await.expect_err("nobody is there");
        assert!(matches!(error.code(), None | Some("UNAVAILABLE")), "{error}");
    }
}
