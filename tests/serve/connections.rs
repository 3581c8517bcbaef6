//! How long connections live.

use std::time::Duration;

use warm::wire::{self, sample::Input};

use super::running::Running;

/// A connection that nobody uses, until the server ends it.
async fn until_it_is_ended(address: &str) -> Result<(), h2::Error> {
    let stream = tokio::net::TcpStream::connect(address).await.expect("connected");
    let (sender, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    let ended = connection.await;
    drop(sender);
    ended
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_old_ends_in_peace_and_no_call_with_it() {
    let server = Running::start(super::members(), &[("http2.max_connection_age", "50ms")]).await;
    let sample = wire::Sample { input: Some(Input::Text("a caller that stays".into())) };
    let request = wire::ScoreRequest { samples: vec![sample], ..Default::default() };
    // As long as five connections live one after the other, the client calls without a pause, over its own ones.
    let address = server.address.clone();
    let others = async move {
        for _ in 0..5 {
            let ended = tokio::time::timeout(Duration::from_secs(60), until_it_is_ended(&address)).await;
            ended.expect("old connections end").expect("GOAWAY without an error, and nothing else");
        }
    };
    let mut others = std::pin::pin!(others);
    let mut calls = 0_u64;
    loop {
        tokio::select! {
            biased;
            () = &mut others => break,
            answer = server.client.score(request.clone()) => {
                assert!(answer.expect("scored").scores[0].reward.is_some());
                calls += 1;
            }
        }
    }
    assert!(calls > 0);
    server.stopped().await;
}
