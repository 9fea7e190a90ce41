//! `/guest` on the admin listener: which guest serves, and another in its place.

use std::error::Error;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, StatusCode};
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::task;
use tokio::time::timeout;

use super::turns::elsewhere;
use super::{Answer, not_allowed, text};
use crate::audit::{self, Actor};
use crate::edge::linger;
use crate::guest::{Ended, GUEST_BYTES, Outcome, ShadowPlan, Source, Steps, SwapError, Swapper};
use crate::parse;

/// How long a component may take to arrive.
const ARRIVAL: Duration = Duration::from_secs(60);
/// Size of the pieces in which it is kept until then.
const PIECE_BYTES: usize = 1 << 20;

/// Answers what is asked of `/guest`.
pub struct Guests {
    swapper: Arc<Swapper>,
    /// Components are large: one arrives at a time.
    arriving: Mutex<()>,
}

impl Guests {
    pub fn new(swapper: Arc<Swapper>) -> Self {
        Self { swapper, arriving: Mutex::default() }
    }

    pub async fn respond(&self, request: Request<Incoming>, actor: &Actor) -> Answer {
        let is_swap = matches!(*request.method(), Method::PUT | Method::DELETE);
        let steps = match request.uri().query() {
            Some("rollback") if request.method() == Method::DELETE => return self.roll_back(actor),
            query => match steps(query.unwrap_or_default()) {
                Ok(steps) => steps,
                Err(reason) => {
                    let refusal = line(StatusCode::BAD_REQUEST, reason);
                    return if is_swap { recorded(actor, Steps::default(), refusal) } else { refusal };
                }
            },
        };
        match *request.method() {
            Method::GET | Method::HEAD => {
                let swapper = Arc::clone(&self.swapper);
                elsewhere(move || document(swapper.status())).await
            }
            Method::PUT => {
                let Ok(_alone) = self.arriving.try_lock() else {
                    let (head, body) = request.into_parts();
                    linger(&head.headers, body);
                    return recorded(actor, steps, refused(&SwapError::Busy));
                };
                match read(request).await {
                    Ok(component) => self.swap(Source::Sent, component, steps, actor).await,
                    Err(refusal) => recorded(actor, steps, refusal),
                }
            }
            // What is removed is the guest that was put there; what is left is the one in the binary.
            Method::DELETE => match Source::BuiltIn.read() {
                Ok(component) => self.swap(Source::BuiltIn, component, steps, actor).await,
                Err(error) => recorded(actor, steps, refused(&SwapError::Failed(error))),
            },
            _ => not_allowed("GET, HEAD, PUT, DELETE"),
        }
    }

    fn roll_back(&self, actor: &Actor) -> Answer {
        let ended = self.swapper.roll_back();
        let object = match ended {
            Some(Ended::Probation) => "probation",
            Some(Ended::Shadow) => "shadow traffic",
            None => "none",
        };
        audit::log(actor, "rollback", object, if ended.is_some() { "success" } else { "nothing to roll back" });
        match ended {
            Some(Ended::Probation) => {
                line(StatusCode::ACCEPTED, "rolling back: the previous guest serves again in a moment")
            }
            Some(Ended::Shadow) => line(StatusCode::ACCEPTED, "shadow traffic ends: the same guest continues to serve"),
            None => line(StatusCode::CONFLICT, "no guest is on probation, and there is no shadow traffic"),
        }
    }

    async fn swap(&self, source: Source, component: Vec<u8>, steps: Steps, actor: &Actor) -> Answer {
        if !steps.dry_run && self.swapper.follows_primary() {
            let reason = "this server stands by and serves the guest of its primary; swap the guest there";
            return recorded(actor, steps, line(StatusCode::CONFLICT, reason));
        }
        if steps.shadow.is_some() && self.swapper.stands_by() {
            let reason = "this server stands by and gets no writes to compare; use shadow traffic on its primary";
            return recorded(actor, steps, line(StatusCode::CONFLICT, reason));
        }
        match self.swapper.swap(source, component, steps, actor.clone()).await {
            Ok(outcome) => document(report(&outcome)),
            Err(error) => refused(&error),
        }
    }
}

/// Records a swap that was rejected before it began, and returns the response to it.
fn recorded(actor: &Actor, steps: Steps, refusal: Answer) -> Answer {
    audit::log(actor, steps.action(), "none", format_args!("rejected: {}", refusal.status()));
    refusal
}

/// Parses the query of a swap.
fn steps(query: &str) -> Result<Steps, String> {
    let mut steps = Steps::default();
    let (mut duration, mut sample, mut max_differences) = (None, None, None);
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let value = percent_decode_str(value).decode_utf8_lossy();
        let invalid = |reason: String| format!("{name}: {reason}");
        match name {
            "dry-run" if value.is_empty() => steps.dry_run = true,
            "shadow" => duration = Some(parse::shadow(&value).map_err(invalid)?),
            "sample" => sample = Some(parse::percent(&value).map_err(invalid)?),
            "max-differences" => {
                max_differences = Some(value.parse::<u64>().map_err(|error| invalid(error.to_string()))?)
            }
            _ => {
                return Err("unknown query; there are ?dry-run, ?shadow=TIME with &sample=PERCENT and \
                            &max-differences=COUNT, and ?rollback for DELETE"
                    .to_owned());
            }
        }
    }
    steps.shadow = match (duration, sample, max_differences) {
        (None, None, None) => None,
        (None, ..) => return Err("sample and max-differences need shadow=TIME".to_owned()),
        (Some(duration), sample, max_differences) => Some(ShadowPlan {
            duration,
            sample: sample.unwrap_or(ShadowPlan::DEFAULT_SAMPLE),
            max_differences: max_differences.unwrap_or_default(),
        }),
    };
    Ok(steps)
}

async fn read(request: Request<Incoming>) -> Result<Vec<u8>, Answer> {
    let too_large = || line(StatusCode::PAYLOAD_TOO_LARGE, format!("a guest is at most {GUEST_BYTES} bytes"));
    let body = request.into_body();
    if body.size_hint().lower() > GUEST_BYTES {
        return Err(too_large());
    }
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    let arriving = async {
        let mut body = Limited::new(body, GUEST_BYTES as usize);
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            // Each frame holds a buffer of the connection, however little of it was filled.
            match pieces.last_mut().filter(|last| last.len() + data.len() <= PIECE_BYTES) {
                Some(last) => last.extend_from_slice(&data),
                None => {
                    let mut piece = Vec::with_capacity(PIECE_BYTES);
                    piece.extend_from_slice(&data);
                    pieces.push(piece);
                }
            }
        }
        Ok::<_, Box<dyn Error + Send + Sync>>(())
    };
    match timeout(ARRIVAL, arriving).await {
        // Copying and freeing hundreds of megabytes takes a while, in which this thread would answer nobody else.
        Ok(Ok(())) => task::spawn_blocking(move || pieces.concat())
            .await
            .map_err(|error| line(StatusCode::INTERNAL_SERVER_ERROR, error)),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(line(StatusCode::BAD_REQUEST, "the body is malformed or incomplete")),
        Err(_) => Err(line(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time")),
    }
}

fn report(outcome: &Outcome) -> Value {
    let Outcome { guest, version, digest, replayed, memory_bytes, pause, shadow } = outcome;
    json!({
        "name": guest,
        "version": version,
        "sha256": digest,
        "entries": replayed.entries,
        "keys": replayed.keys,
        "memory_bytes": memory_bytes,
        "seconds": replayed.took.as_secs_f64(),
        "pause_seconds": pause.map(|pause| pause.as_secs_f64()),
        "shadow": shadow,
    })
}

fn refused(error: &SwapError) -> Answer {
    let status = match error {
        SwapError::Busy => StatusCode::CONFLICT,
        SwapError::Unfit(_) | SwapError::RolledBack { .. } | SwapError::Shadow { .. } => {
            StatusCode::UNPROCESSABLE_ENTITY
        }
        SwapError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
    };
    line(status, error)
}

fn line(status: StatusCode, reason: impl Display) -> Answer {
    text(status, format!("{reason}\n"))
}

fn document(value: Value) -> Answer {
    let mut response = text(StatusCode::OK, format!("{value:#}\n"));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::poll_fn;
    use std::io;
    use std::pin::{Pin, pin};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Poll};

    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

    use super::super::turns::{BUFFER_BYTES, http};
    use super::*;

    /// A client whose socket always has as much to read as there is room for.
    struct Eager {
        head: &'static [u8],
        read: Arc<AtomicUsize>,
    }

    impl AsyncRead for Eager {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            if self.head.is_empty() {
                self.read.fetch_add(into.remaining(), Ordering::Relaxed);
                into.initialize_unfilled();
                into.set_filled(into.capacity());
            } else {
                into.put_slice(std::mem::take(&mut self.head));
            }
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Eager {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn component_arrives_in_short_turns() {
        let read_bytes = Arc::new(AtomicUsize::new(0));
        let head = b"PUT /guest HTTP/1.1\r\nhost: kvs\r\nconnection: close\r\ncontent-length: 16777216\r\n\r\n";
        let client = Eager { head, read: Arc::clone(&read_bytes) };
        let arrived = AtomicUsize::new(0);
        let service = service_fn(|request| async {
            let component = read(request).await.unwrap_or_default();
            arrived.store(component.len(), Ordering::Relaxed);
            Ok::<_, Infallible>(text(StatusCode::OK, ""))
        });
        let mut served = pin!(http().serve_connection(TokioIo::new(client), service));
        let (mut most, mut turns) = (0, 0);
        poll_fn(|context| {
            let before = read_bytes.load(Ordering::Relaxed);
            let polled = served.as_mut().poll(context);
            most = most.max(read_bytes.load(Ordering::Relaxed) - before);
            turns += 1;
            polled
        })
        .await
        .unwrap();
        assert_eq!(arrived.load(Ordering::Relaxed), 16 << 20);
        assert!(most <= 2 * BUFFER_BYTES, "{most} bytes were read in a turn, of {turns}");
    }

    #[test]
    fn query_chooses_the_steps() {
        let shadow = |query| {
            let ShadowPlan { duration, sample, max_differences } =
                steps(query).expect("it is valid").shadow.expect("shadow");
            (duration.as_secs(), sample, max_differences)
        };
        assert!(steps("").is_ok_and(|steps| !steps.dry_run && steps.shadow.is_none()));
        assert!(steps("dry-run").is_ok_and(|steps| steps.dry_run && steps.shadow.is_none()));
        assert_eq!(shadow("shadow=60s"), (60, 10.0, 0));
        assert_eq!(shadow("shadow=2m&sample=0.5%25&max-differences=7&dry-run"), (120, 0.5, 7));
    }

    #[test]
    fn query_that_is_wrong_is_rejected() {
        for (query, reason) in [
            ("dry", "unknown query"),
            ("dry-run=1", "unknown query"),
            ("rollback", "unknown query"),
            ("sample=10", "need shadow=TIME"),
            ("shadow=61m", "shadow: must be at most 1h"),
            ("shadow=", "shadow: "),
            ("shadow=1s&sample=0", "sample: must be a percentage"),
            ("shadow=1s&sample=101", "sample: must be a percentage"),
            ("shadow=1s&sample=NaN", "sample: must be a percentage"),
            ("shadow=1s&max-differences=-1", "max-differences: "),
        ] {
            let error = steps(query).expect_err(query);
            assert!(error.contains(reason), "{query}: {error}");
        }
    }
}
