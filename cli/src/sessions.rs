//! `sessions`, `attach` and `logs`: what runs in a sandbox, a way into it, and what it has said.

use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cubbyhole::{LogLine, LogOptions, LogSource, Sandbox, SessionEnd, SessionInfo};
use serde_json::{Value, json};
use tokio_stream::StreamExt;

use crate::amount::duration;
use crate::arguments::{Attach, Logs, Source};
use crate::failure::Failure;
use crate::output::{self, Colour};
use crate::session::{self, Ended};
use crate::table::{self, Cell};
use crate::terminal;
use crate::time::{ago, moment, rfc3339};

/// `cubby sessions`
pub async fn list(name: &str, as_json: bool) -> Result<u8, Failure> {
    let sessions = Sandbox::get(name).await?.sessions().await?;
    if as_json {
        return output::print_json(&sessions.iter().map(whole).collect());
    }
    let now = SystemTime::now();
    let rows: Vec<[Cell; 6]> = sessions.iter().map(|session| row(session, now)).collect();
    let header = ["SESSION", "COMMAND", "PID", "STATUS", "ATTACHED", "STARTED"];
    let text = table::render(header, &rows, terminal::width_of_stdout(), output::colour_on_stdout());
    output::print(text.as_bytes())
}

fn row(session: &SessionInfo, now: SystemTime) -> [Cell; 6] {
    let (status, colour) = match session.end {
        None if session.detached => ("Detached".into(), Some(Colour::Green)),
        None => ("Running".into(), Some(Colour::Green)),
        Some(end) => (ended(end), None),
    };
    [
        Cell::from(session.id.to_string()),
        Cell::from(session.command.join(" ")),
        Cell::from(session.pid.map_or("-".into(), |pid| pid.to_string())),
        Cell::coloured(&status, colour),
        Cell::from(session.attached.to_string()),
        Cell::from(ago(now.duration_since(session.started_at).unwrap_or_default())),
    ]
}

fn ended(end: SessionEnd) -> String {
    match end {
        SessionEnd::Exited(status) => match (status.code, status.signal) {
            (Some(code), _) => format!("Exited ({code})"),
            (None, signal) => format!("Killed ({})", signal.unwrap_or_default()),
        },
        SessionEnd::OutOfMemory => "Out of memory".into(),
        SessionEnd::TimedOut => "Timed out".into(),
        SessionEnd::NotRun(kind) => format!("Not run: {kind}"),
        _ => "Ended".into(),
    }
}

fn whole(session: &SessionInfo) -> Value {
    let status = session.status();
    json!({
        "id": session.id,
        "command": session.command,
        "started_at": rfc3339(session.started_at),
        "pid": session.pid,
        "tty": session.tty,
        "detached": session.detached,
        "attached": session.attached,
        "ended": session.end.map(ended),
        "code": status.and_then(|status| status.code),
        "signal": status.and_then(|status| status.signal),
    })
}

/// `cubby attach`
pub async fn attach(attach: Attach) -> Result<u8, Failure> {
    let failed = |error| Failure::of_command(&error);
    let sandbox = Sandbox::get(&attach.name).await.map_err(failed)?;
    let sessions = sandbox.sessions().await.map_err(failed)?;
    let id = match attach.session {
        Some(id) => id,
        None => the_only_one(&attach.name, &sessions)?,
    };
    let tty = sessions.iter().any(|session| session.id == id && session.tty);
    match session::join(&sandbox, id, tty, !attach.no_stdin, attach.detach_keys).await? {
        Ended::Exited(code) | Ended::Abandoned(code) => Ok(code),
        Ended::Detached(_) => Ok(0),
    }
}

fn the_only_one(name: &str, sessions: &[SessionInfo]) -> Result<u32, Failure> {
    let candidates: Vec<&SessionInfo> =
        sessions.iter().filter(|session| session.detached && session.end.is_none()).collect();
    match candidates[..] {
        [session] => Ok(session.id),
        [] => Err(Failure::own(format!(
            "sandbox {name:?} has no detached session that runs: cubby exec -d {name} COMMAND starts one"
        ))),
        _ => Err(Failure::own(format!(
            "sandbox {name:?} has {} detached sessions: choose one of cubby sessions {name}",
            candidates.len()
        ))),
    }
}

/// `cubby logs`
pub async fn logs(logs: Logs) -> Result<u8, Failure> {
    let sandbox = Sandbox::get(&logs.name).await?;
    let options = LogOptions {
        follow: logs.follow,
        since: logs.since,
        tail: logs.tail.0,
        session: logs.session,
        sources: logs.source.into_iter().map(source).collect(),
    };
    let mut lines = sandbox.logs(options).await?;
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    loop {
        let line = tokio::select! {
            line = lines.next() => line,
            _ = &mut interrupted => return Ok(130),
        };
        match line {
            Some(line) if logs.json => {
                output::print(output::json_line(&told(&line).to_string()).as_bytes()).map(drop)?
            }
            Some(line) => print(&line, logs.timestamps)?,
            None => return Ok(0),
        }
    }
}

fn source(source: Source) -> LogSource {
    match source {
        Source::Stdout => LogSource::Stdout,
        Source::Stderr => LogSource::Stderr,
        Source::Terminal => LogSource::Terminal,
        Source::Console => LogSource::Console,
    }
}

fn told(line: &LogLine) -> Value {
    let source = match line.source {
        LogSource::Stdout => "stdout",
        LogSource::Stderr => "stderr",
        LogSource::Terminal => "terminal",
        LogSource::Console => "console",
        LogSource::Gap => "gap",
        _ => "unknown",
    };
    json!({
        "at": rfc3339(line.at),
        "source": source,
        "session": line.session,
        "text": line.text(),
        "ended": line.ended,
    })
}

/// Writes a line where its command wrote it.
fn print(line: &LogLine, timestamps: bool) -> Result<(), Failure> {
    let mut text = Vec::new();
    if timestamps {
        text.extend_from_slice(format!("{} ", rfc3339(line.at)).as_bytes());
    }
    text.extend_from_slice(&line.bytes);
    // Without the time, parts of a line are put together again.
    if line.ended || timestamps {
        text.push(b'\n');
    }
    match line.source {
        // Whoever closed it does not want it, and may want the rest.
        LogSource::Stderr | LogSource::Gap => drop(io::stderr().lock().write_all(&text)),
        _ => drop(output::print(&text)?),
    }
    Ok(())
}

/// `--tail`: a number of lines, or `all`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail(pub Option<usize>);

impl std::str::FromStr for Tail {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self(None)),
            text => {
                text.parse().map(|lines| Self(Some(lines))).map_err(|_| "a number of lines, or all".into())
            }
        }
    }
}

/// `--since`: a moment, seconds since 1970, or how long ago it was.
pub fn since(text: &str) -> Result<SystemTime, String> {
    if let Some(moment) = moment(text) {
        return Ok(moment);
    }
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(UNIX_EPOCH + Duration::from_secs(seconds));
    }
    let ago = duration(text).map_err(|_| {
        "how long ago (10m), a moment (2026-01-31T12:00:00Z), or seconds since 1970".to_owned()
    })?;
    Ok(SystemTime::now().checked_sub(ago).unwrap_or(UNIX_EPOCH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_understood_as_docker_does() {
        let at = |seconds| Ok(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(since("1735689599"), at(1_735_689_599));
        assert_eq!(since("2024-12-31T23:59:59Z"), at(1_735_689_599));
        let moment = since("10m").unwrap();
        let ago = SystemTime::now().duration_since(moment).unwrap();
        assert!((600..660).contains(&ago.as_secs()));
        assert!(since("yesterday").is_err());
        assert_eq!("all".parse(), Ok(Tail(None)));
        assert_eq!("7".parse(), Ok(Tail(Some(7))));
        assert!("-1".parse::<Tail>().is_err());
    }
}
