//! Ten thousand requests with random cancels and deadlines, over a socket: each is answered once, and nothing is left of
//! any of them.

use std::collections::HashSet;
use std::time::Duration;

use super::{Server, score_of, start};
use crate::client::{Client, ClientError, StreamAnswers, StreamRequests};
use crate::registry::testing::FakeModel;
use crate::wire;

/// Numbers that look random, the same ones in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    fn request(&mut self, id: &str) -> wire::ScoreRequest {
        let texts: Vec<String> = (0..1 + self.below(4)).map(|_| "x".repeat(1 + self.below(70) as usize)).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let options = wire::ScoreOptions {
            details: self.below(4) == 0,
            priority: self.below(5) as i32,
            timeout_ms: if self.below(3) == 0 { 1 + self.below(50) as u32 } else { 0 },
            ..Default::default()
        };
        wire::ScoreRequest { request_id: id.to_owned(), options: Some(options), ..score_of(&texts) }
    }
}

/// Calls one after the other; says how many were answered and how many were dropped.
async fn call(client: Client, calls: u64, seed: u64) -> (u64, u64) {
    let mut dice = Dice(seed);
    let (mut answered, mut dropped) = (0, 0);
    for _ in 0..calls {
        let mut request = tonic::Request::new(dice.request(""));
        if dice.below(3) == 0 {
            request.set_timeout(Duration::from_millis(dice.below(51)));
        }
        let mut rewards = client.rewards();
        if dice.below(3) == 0 {
            rewards = rewards.send_compressed(tonic::codec::CompressionEncoding::Zstd);
        }
        let patience = (dice.below(8) == 0).then(|| dice.below(40));
        let gone = async {
            match patience {
                Some(turns) => {
                    for _ in 0..turns {
                        tokio::task::yield_now().await;
                    }
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            answer = rewards.score(request) => {
                answered += 1;
                match answer {
                    Ok(response) => assert!(!response.into_inner().scores.is_empty()),
                    Err(status) => {
                        let code = ClientError::from(status).code().expect("a status");
                        assert!(["DEADLINE_EXCEEDED", "CANCELLED", "RESOURCE_EXHAUSTED"].contains(&code), "{code}");
                    }
                }
            }
            () = gone => dropped += 1,
        }
    }
    (answered, dropped)
}

/// Asks on one stream, withdraws some of it, and checks that every request has one answer.
async fn stream((requests, mut answers): (StreamRequests, StreamAnswers), asked: u64, seed: u64) {
    let mut dice = Dice(seed);
    let asking = async move {
        for i in 0..asked {
            assert!(requests.score(dice.request(&i.to_string())).await, "the stream is open");
            if dice.below(4) == 0 {
                assert!(requests.cancel(&dice.below(i + 1).to_string()).await, "the stream is open");
            }
        }
    };
    let reading = async {
        let mut seen = HashSet::new();
        while let Some(answer) = answers.next().await.expect("an open stream") {
            assert!(seen.insert(answer.request_id.clone()), "{} is answered twice", answer.request_id);
            match answer.error {
                // DEADLINE_EXCEEDED, CANCELLED, RESOURCE_EXHAUSTED
                Some(error) => assert!([4, 1, 8].contains(&error.code), "{error:?}"),
                None => assert!(!answer.scores.is_empty()),
            }
        }
        seen.len() as u64
    };
    let ((), seen) = tokio::join!(asking, reading);
    assert_eq!(seen, asked);
}

/// What is left of requests.
fn left(server: &Server) -> Vec<f64> {
    let gauges = [
        "warm_scorer_queue_samples",
        "warm_scorer_queue_tokens",
        "warm_scorer_in_flight_requests",
        "warm_scorer_in_flight_bytes",
        "warm_scorer_in_flight_tokens",
        "warm_serve_in_flight_requests{rpc=\"Score\"}",
        "warm_serve_in_flight_requests{rpc=\"ScoreStream\"}",
        "warm_serve_in_flight_requests{rpc=\"ScoreStream.request\"}",
    ];
    gauges.map(|gauge| server.metric(gauge)).to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_requests_are_answered_once_each_and_nothing_is_left_of_them() {
    const CALLERS: u64 = 24;
    const CALLS: u64 = 250;
    const STREAMS: u64 = 4;
    const ASKED: u64 = 1000;
    let settings =
        [("max_pack_tokens", "256"), ("admission.max_requests", "96"), ("admission.max_tokens", "4000"), ("stream.window", "16")];
    let mut server = start(&settings, FakeModel::new(1.0), &[]).await;
    let mut tasks = tokio::task::JoinSet::new();
    // All are open before anybody asks: one that comes while its tenant holds its share is refused, as it should be.
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let client = Client::connect(&server.address).await.expect("connected");
        streams.push(client.score_stream().await.expect("a stream"));
    }
    for (number, opened) in streams.into_iter().enumerate() {
        tasks.spawn(async move {
            stream(opened, ASKED, 104_729 + number as u64).await;
            (ASKED, 0)
        });
    }
    for caller in 0..CALLERS {
        let client = server.client.clone();
        tasks.spawn(async move { call(client, CALLS, 1 + 7919 * caller).await });
    }
    let (mut answered, mut dropped) = (0, 0);
    while let Some(ended) = tasks.join_next().await {
        let (more, gone) = ended.expect("no panic");
        (answered, dropped) = (answered + more, dropped + gone);
    }
    assert_eq!(answered + dropped, CALLERS * CALLS + STREAMS * ASKED);
    assert!(answered > dropped && dropped > 0, "{answered} answered, {dropped} dropped");
    // What was dropped goes when the server hears of it.
    server.in_flight.wait_for(|&requests| requests == 0).await.expect("server runs");
    while left(&server).iter().any(|left| *left != 0.0) {
        tokio::task::yield_now().await;
    }
    server.client.score(score_of(&["x"])).await.expect("as if nothing had been");
    server.stopped().await;
}
