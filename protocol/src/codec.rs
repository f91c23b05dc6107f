//! Messages to bytes and back: the only place that knows the serialisation format. It is bincode 2 with
//! variable-length integers, always under a limit, and nothing may follow a message.

use bincode::config::{self, Config};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{FrameError, Header, Kind, MAX_PAYLOAD, SessionId};

fn format() -> impl Config {
    config::standard().with_limit::<MAX_PAYLOAD>()
}

/// Appends a frame with `message` as its payload to `out`; on an error `out` is as it was.
pub fn encode<M: Serialize>(
    kind: Kind,
    session: SessionId,
    message: &M,
    out: &mut Vec<u8>,
) -> Result<(), FrameError> {
    let payload = bincode::serde::encode_to_vec(message, format())
        .map_err(|error| FrameError::Malformed { what: name::<M>(), why: error.to_string() })?;
    encode_raw(kind, session, &payload, out).map_err(|_| FrameError::DoesNotFit { what: name::<M>() })
}

/// Appends a frame with `payload` as it is to `out`; on an error `out` is as it was.
pub fn encode_raw(
    kind: Kind,
    session: SessionId,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), FrameError> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    if payload.len() > MAX_PAYLOAD {
        return Err(FrameError::TooLong { length });
    }
    out.reserve(Header::SIZE + payload.len());
    out.extend_from_slice(&Header { length, kind, session }.to_bytes());
    out.extend_from_slice(payload);
    Ok(())
}

/// Reads the message that fills `payload` exactly.
pub fn decode<M: DeserializeOwned>(payload: &[u8]) -> Result<M, FrameError> {
    let malformed = |why| FrameError::Malformed { what: name::<M>(), why };
    match bincode::serde::decode_from_slice(payload, format()) {
        Ok((message, used)) if used == payload.len() => Ok(message),
        Ok((_, used)) => Err(malformed(format!("{} bytes too many", payload.len() - used))),
        Err(error) => Err(malformed(error.to_string())),
    }
}

fn name<M>() -> &'static str {
    let path = std::any::type_name::<M>();
    path.rsplit_once("::").map_or(path, |(_, name)| name)
}
