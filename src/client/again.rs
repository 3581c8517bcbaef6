//! Calls that a connection ended before they began.
//!
//! A server that wants no more calls on a connection (it is old, or the server goes) says so with GOAWAY, and a call may be on
//! its way into that connection at the same moment. No server has begun such a call, so it is made again, on another connection,
//! as gRPC clients do (gRPC A6, transparent retries).

use std::error::Error;
use std::future::Future;

use tonic::{Response, Status};

/// How often one call is made at most: connections that all end before it begins are no accident.
const MOST: usize = 4;

/// Makes a call, and makes it again while it never begins.
pub(super) async fn made<T, F>(call: impl Fn() -> F) -> Result<T, Status>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    for _ in 1..MOST {
        match call().await {
            Err(status) if never_began(&status) => tracing::debug!(status = status.message(), "the call is made again"),
            answer => return answer.map(Response::into_inner),
        }
    }
    call().await.map(Response::into_inner)
}

/// Whether no server can have begun the call: it never left this side, or the server's GOAWAY leaves it out. (A stream that a
/// server refuses was not begun either, but a server that refuses is asked again by whoever knows when.)
fn never_began(status: &Status) -> bool {
    let mut next = status.source();
    while let Some(error) = next {
        if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled) {
            return true;
        }
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return error.is_remote() && error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
        }
        next = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tonic::transport::Endpoint;

    use super::*;

    /// A status for what became of a request in HTTP/2.
    fn status(error: impl Error + Send + Sync + 'static) -> Status {
        Status::from_error(Box::new(error))
    }

    /// What hyper says of a request that it was given for a connection that ended before it took it up.
    async fn canceled() -> hyper::Error {
        let (near, _far) = tokio::io::duplex(1024);
        let executor = hyper_util::rt::TokioExecutor::new();
        let io = hyper_util::rt::TokioIo::new(near);
        let (mut sender, connection) = hyper::client::conn::http2::handshake::<_, _, String>(executor, io).await.expect("a connection");
        drop(connection);
        sender.send_request(http::Request::new(String::new())).await.expect_err("it has ended")
    }

    #[tokio::test]
    async fn a_call_that_never_began_is_made_again_and_no_other_is() {
        let answers = [status(canceled().await), Status::unavailable("full")];
        for (first, calls) in answers.into_iter().zip([2, 1]) {
            let (made, first) = (Cell::new(0), Cell::new(Some(first)));
            let answer = super::made(|| {
                made.set(made.get() + 1);
                std::future::ready(first.take().map_or(Ok(Response::new(7)), Err))
            });
            assert_eq!((answer.await.ok(), made.get()), ((calls == 2).then_some(7), calls));
        }
    }

    #[tokio::test]
    async fn connections_that_all_end_before_a_call_begins_are_told() {
        let mut errors = Vec::new();
        for _ in 0..MOST {
            errors.push(status(canceled().await));
        }
        let errors = std::cell::RefCell::new(errors);
        let answer = super::made(|| std::future::ready(Err::<Response<()>, _>(errors.borrow_mut().pop().expect("not more calls"))));
        assert_eq!(answer.await.expect_err("never begun").code(), tonic::Code::Cancelled);
        assert!(errors.borrow().is_empty());
    }

    const HEADERS_OF_STREAM_1: [u8; 6] = [1, 4, 0, 0, 0, 1];

    /// A server that answers the first request on each connection with these bytes behind its settings, and ends the connection.
    async fn answered(frame: &[u8]) -> Status {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let endpoint = Endpoint::from_shared(format!("http://{}", listener.local_addr().expect("an address"))).expect("an address");
        let serve = async {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            // No settings; then what comes with the request, of which nothing is read but that it has come.
            stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.expect("written");
            let mut seen = Vec::new();
            while !seen.windows(6).any(|window| window == HEADERS_OF_STREAM_1) {
                let mut buffer = [0; 1024];
                let count = stream.read(&mut buffer).await.expect("read");
                assert!(count > 0, "the request comes first");
                seen.extend_from_slice(&buffer[..count]);
            }
            stream.write_all(frame).await.expect("written");
            // The connection stays for as long as the call does.
            std::future::pending::<()>().await;
        };
        let call = async {
            let mut health = tonic_health::pb::health_client::HealthClient::new(endpoint.connect_lazy());
            health.check(tonic_health::pb::HealthCheckRequest::default()).await.expect_err("no answer")
        };
        tokio::select! {
            status = call => status,
            () = serve => unreachable!("it stays"),
        }
    }

    #[tokio::test]
    async fn what_a_server_leaves_out_never_began_and_what_it_refuses_or_breaks_off_is_told() {
        let goaway = |last: u8, reason: u8| [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, last, 0, 0, 0, reason];
        let reset = |reason: u8| [0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, reason];
        let (refused_stream, internal) = (7, 2);
        for (frame, never) in [
            (goaway(0, 0).to_vec(), true),
            (reset(refused_stream).to_vec(), false),
            (goaway(0, internal).to_vec(), false),
            (reset(internal).to_vec(), false),
        ] {
            let status = answered(&frame).await;
            assert_eq!(never_began(&status), never, "{status:?}");
        }
        assert!(!never_began(&Status::cancelled("operation was canceled")), "what a server says is an answer");
    }
}
