//! What a sandbox has written: the output of its sessions and its console, by line and time, while it runs, after it has
//! stopped and after a crash.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use cubby_state::log::{Reader, Record, Source};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;

use crate::error::{Error, R};
use crate::link::Link;
use crate::sandbox::Sandbox;

/// How often a log that is followed is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Of so many looks in a row that find nothing, the last also asks whether the sandbox has ended.
const PATIENCE: u32 = 10;

/// A line that is longer comes in parts, in bytes.
const MAX_LINE: usize = 64 << 10;

/// Which lines of a log. The default is all that there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Go on with what is written from now on, until the sandbox ends.
    pub follow: bool,
    /// None that is older.
    pub since: Option<SystemTime>,
    /// Of those that there are, so many of the newest.
    pub tail: Option<usize>,
    /// Only those of this session.
    pub session: Option<u32>,
    /// Only those from these sources; all, if there are none.
    pub sources: Vec<LogSource>,
}

/// Where a line comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LogSource {
    /// Standard output of a session.
    Stdout,
    /// Standard error of a session.
    Stderr,
    /// The terminal of a session, with all that makes a terminal do things.
    Terminal,
    /// The guest's console.
    Console,
    /// Nowhere: the line says how many bytes are missing here, because they came too fast or there was no room on the
    /// disk.
    Gap,
}

/// A line, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LogLine {
    /// When its first byte came, by the host's clock.
    pub at: SystemTime,
    /// Where it comes from.
    pub source: LogSource,
    /// The session, if it is one's. Numbers begin anew with each run of the sandbox.
    pub session: Option<u32>,
    /// Its bytes, without the end of the line: they are the guest's, and need not be text.
    pub bytes: Bytes,
    /// Whether the line ends here. Otherwise it goes on in a later one of the same source and session, or was never ended.
    pub ended: bool,
}

impl LogLine {
    /// The line as text; what is no UTF-8 is replaced.
    pub fn text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.bytes)
    }
}

impl Sandbox {
    /// What its sessions and its console have written, oldest first, over all runs: the newest 4 to 8 MiB, as long as the
    /// sandbox is not removed. It needs no running sandbox. With `follow` the stream goes on until the sandbox ends; lines
    /// appear within a tenth of a second.
    ///
    /// A log never slows a command down: of output that comes faster than 12 MiB in a second the middle is missing, which
    /// a line from [`LogSource::Gap`] says. Of a sandbox that was made with `logs(false)` there is nothing.
    ///
    /// ```no_run
    /// # async fn example(sandbox: cubbyhole::Sandbox) -> Result<(), cubbyhole::Error> {
    /// use cubbyhole::LogOptions;
    /// use tokio_stream::StreamExt;
    ///
    /// let mut lines = sandbox.logs(LogOptions { tail: Some(10), ..LogOptions::default() }).await?;
    /// while let Some(line) = lines.next().await {
    ///     println!("{:?} {}", line.source, line.text());
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn logs(&self, options: LogOptions) -> R<impl Stream<Item = LogLine> + Send + Unpin + 'static> {
        let record = self.link.record()?;
        let paths = self.link.context.store.home().logs(&record.name);
        let path = self.link.context.store.home().sandbox(&record.name);
        let mut reader = Reader::new(paths);
        let first = read(&mut reader).await.map_err(|source| Error::File { path, source })?;
        let (sender, receiver) = mpsc::channel(64);
        let link = self.link.clone();
        tokio::spawn(async move {
            // Whoever does not listen any more has ended it.
            let _ = deliver(&link, reader, first, &options, &sender).await;
        });
        Ok(ReceiverStream::new(receiver))
    }
}

/// Reads what is new, apart from the threads that run futures.
async fn read(reader: &mut Reader) -> std::io::Result<Vec<Record>> {
    let mut own = reader.clone();
    let (own, records) = tokio::task::spawn_blocking(move || {
        let records = own.read();
        (own, records)
    })
    .await
    .map_err(std::io::Error::other)?;
    *reader = own;
    records
}

/// Nobody listens.
struct Unheard;

async fn deliver(
    link: &Arc<Link>,
    mut reader: Reader,
    first: Vec<Record>,
    options: &LogOptions,
    to: &mpsc::Sender<LogLine>,
) -> Result<(), Unheard> {
    let mut lines = Lines::default();
    let mut out = Vec::new();
    lines.add(first, &mut out);
    if !options.follow {
        lines.finish(&mut out);
    }
    out.retain(|line| options.wants(line));
    let skipped = options.tail.map_or(0, |tail| out.len().saturating_sub(tail));
    send(out.drain(..).skip(skipped), to).await?;
    if !options.follow {
        return Ok(());
    }
    let mut quiet = 0;
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = to.closed() => return Err(Unheard),
        }
        // Asked before the last look: what was written before it ended is there then.
        let over = quiet >= PATIENCE && !link.is_live().unwrap_or(false);
        let Ok(records) = read(&mut reader).await else { return Ok(()) };
        if records.is_empty() {
            quiet += 1;
            // A question without a newline is to be seen before it is answered.
            lines.finish(&mut out);
        } else {
            quiet = 0;
            lines.add(records, &mut out);
        }
        out.retain(|line| options.wants(line));
        send(out.drain(..), to).await?;
        if over {
            return Ok(());
        }
        if quiet > PATIENCE {
            quiet = 0;
        }
    }
}

async fn send(lines: impl Iterator<Item = LogLine>, to: &mpsc::Sender<LogLine>) -> Result<(), Unheard> {
    for line in lines {
        to.send(line).await.map_err(|_| Unheard)?;
    }
    Ok(())
}

impl LogOptions {
    fn wants(&self, line: &LogLine) -> bool {
        self.since.is_none_or(|since| line.at >= since)
            && (self.session.is_none() || line.session == self.session)
            && (self.sources.is_empty() || self.sources.contains(&line.source))
    }
}

/// Lines that have not ended, by where they come from.
#[derive(Default)]
struct Lines(HashMap<(Source, u32), Begun>);

struct Begun {
    at: SystemTime,
    bytes: Vec<u8>,
}

impl Lines {
    fn add(&mut self, records: Vec<Record>, out: &mut Vec<LogLine>) {
        for Record { header, bytes } in records {
            let at = UNIX_EPOCH + Duration::from_nanos(header.at_ns);
            let source = match header.source {
                Source::Stdout => LogSource::Stdout,
                Source::Stderr => LogSource::Stderr,
                Source::Terminal => LogSource::Terminal,
                Source::Console => LogSource::Console,
                Source::Gap => {
                    let missing = bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
                    let text = format!("{missing} bytes of output are missing here");
                    let (source, bytes) = (LogSource::Gap, text.into_bytes().into());
                    out.push(LogLine { at, source, session: None, bytes, ended: true });
                    continue;
                }
                // What had not ended never will.
                Source::Begin => {
                    self.finish(out);
                    continue;
                }
            };
            let session = (header.session != 0).then_some(header.session);
            let mut begun = self.0.remove(&(header.source, header.session));
            for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
                let mut line = begun.take().unwrap_or_else(|| Begun { at, bytes: Vec::new() });
                line.bytes.extend_from_slice(piece);
                let ended = piece.ends_with(b"\n");
                if !ended && line.bytes.len() < MAX_LINE {
                    begun = Some(line);
                    continue;
                }
                let end = if ended { line.bytes.len() - 1 } else { line.bytes.len() };
                line.bytes.truncate(end);
                out.push(LogLine { at: line.at, source, session, bytes: line.bytes.into(), ended });
            }
            if let Some(begun) = begun {
                self.0.insert((header.source, header.session), begun);
            }
        }
    }

    /// Gives out what has not ended.
    fn finish(&mut self, out: &mut Vec<LogLine>) {
        let mut left: Vec<_> = self.0.drain().collect();
        left.sort_by_key(|(_, line)| line.at);
        out.extend(left.into_iter().filter_map(|((source, session), line)| {
            let source = match source {
                Source::Stdout => LogSource::Stdout,
                Source::Stderr => LogSource::Stderr,
                Source::Terminal => LogSource::Terminal,
                Source::Console => LogSource::Console,
                Source::Gap | Source::Begin => return None,
            };
            let session = (session != 0).then_some(session);
            Some(LogLine { at: line.at, source, session, bytes: line.bytes.into(), ended: false })
        }));
    }
}

#[cfg(test)]
mod tests {
    use cubby_state::log::Header;

    use super::*;

    fn record(source: Source, session: u32, at_ns: u64, bytes: &[u8]) -> Record {
        let length = u32::try_from(bytes.len()).unwrap();
        Record { header: Header { length, source, session, at_ns }, bytes: bytes.to_vec() }
    }

    fn shown(lines: &[LogLine]) -> Vec<(LogSource, Option<u32>, u64, String, bool)> {
        let shown = lines.iter().map(|line| {
            let at = line.at.duration_since(UNIX_EPOCH).unwrap().as_nanos().try_into().unwrap();
            (line.source, line.session, at, line.text().into_owned(), line.ended)
        });
        shown.collect()
    }

    #[test]
    fn pieces_become_lines_of_each_source_and_session() {
        let mut lines = Lines::default();
        let mut out = Vec::new();
        lines.add(
            vec![
                record(Source::Stdout, 16, 1, b"one\ntw"),
                record(Source::Stderr, 16, 2, b"err"),
                record(Source::Stdout, 17, 3, b"other\n"),
                record(Source::Stdout, 16, 4, b"o\n\n"),
                record(Source::Gap, 0, 5, &7u64.to_le_bytes()),
                record(Source::Stderr, 16, 6, b"or\n"),
                record(Source::Console, 0, 7, b"no end"),
                record(Source::Begin, 0, 8, b""),
                record(Source::Console, 0, 9, b"\n"),
            ],
            &mut out,
        );
        use LogSource::{Console, Gap, Stderr, Stdout};
        let expected = [
            (Stdout, Some(16), 1, "one", true),
            (Stdout, Some(17), 3, "other", true),
            (Stdout, Some(16), 1, "two", true),
            (Stdout, Some(16), 4, "", true),
            (Gap, None, 5, "7 bytes of output are missing here", true),
            (Stderr, Some(16), 2, "error", true),
            (Console, None, 7, "no end", false),
            (Console, None, 9, "", true),
        ];
        assert_eq!(shown(&out), expected.map(|(a, b, c, text, e)| (a, b, c, text.to_owned(), e)));
        // A line without end is given out in parts.
        out.clear();
        lines.add(vec![record(Source::Stdout, 1, 1, &vec![b'x'; MAX_LINE]); 3], &mut out);
        assert_eq!(
            out.iter().map(|line| (line.bytes.len(), line.ended)).collect::<Vec<_>>(),
            [(MAX_LINE, false); 3]
        );
    }

    #[test]
    fn options_choose_among_lines() {
        let line = |at, source, session| LogLine {
            at: UNIX_EPOCH + Duration::from_secs(at),
            source,
            session,
            bytes: Bytes::new(),
            ended: true,
        };
        let lines = [
            line(1, LogSource::Stdout, Some(16)),
            line(2, LogSource::Stderr, Some(17)),
            line(3, LogSource::Console, None),
        ];
        let chosen = |options: LogOptions| -> Vec<usize> {
            (0..3).filter(|index| options.wants(&lines[*index])).collect()
        };
        assert_eq!(chosen(LogOptions::default()), [0, 1, 2]);
        let since = Some(UNIX_EPOCH + Duration::from_secs(2));
        assert_eq!(chosen(LogOptions { since, ..LogOptions::default() }), [1, 2]);
        assert_eq!(chosen(LogOptions { session: Some(16), ..LogOptions::default() }), [0]);
        let sources = vec![LogSource::Console, LogSource::Stdout];
        assert_eq!(chosen(LogOptions { sources, ..LogOptions::default() }), [0, 2]);
    }
}
