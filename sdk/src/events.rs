//! Events to and from the processes of a guest. The guest's lines are read with limits: what is no event, or is not
//! what was subscribed to, counts as lost and harms nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use cubby_protocol::message::{self, Credit, MAX_EVENT, MAX_EVENT_NAME, Subscribe};
use cubby_protocol::{INITIAL_WINDOW, Kind, decode};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::connection::Session;
use crate::error::{Error, EventFault, R};
use crate::link::Link;
use crate::sandbox::Sandbox;

/// What stands for every name.
const ALL: &str = "*";

/// An event of a process in the guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its name.
    #[serde(rename = "event")]
    pub name: String,
    /// What belongs to it; null if the process sent nothing.
    #[serde(default)]
    pub data: Value,
}

impl Sandbox {
    /// Sends an event to all processes in the guest that are connected to `/run/agent.sock`: a line of JSON,
    /// `{"event":NAME,"data":DATA}`. `Ok` means that the agent has it and has queued it for each of them; it is not
    /// kept for those that connect later. A process that does not read loses events beyond 512 KiB, and is told how
    /// many.
    ///
    /// # Errors
    /// [`Error::BadEvent`] for a line of more than 256 KiB, and for data that is no JSON. [`Error::Draining`] and
    /// [`Error::InvalidState`] as for a command.
    ///
    /// ```no_run
    /// # async fn example(sandbox: cubbyhole::Sandbox) -> Result<(), cubbyhole::Error> {
    /// sandbox.emit("reload", &["a.conf", "b.conf"]).await?;
    /// # Ok(()) }
    /// ```
    pub async fn emit(&self, event: impl AsRef<str>, data: &(impl serde::Serialize + ?Sized)) -> R<()> {
        emit(&self.link, event.as_ref(), data).await
    }

    /// Calls `call` for each event of this name that processes in the guest write to `/run/agent.sock` from now on, until
    /// the subscription is dropped or the sandbox ends; `"*"` stands for every name. Any user of the guest may
    /// write: what arrives is the guest's word.
    ///
    /// ```no_run
    /// # async fn example(sandbox: cubbyhole::Sandbox) -> Result<(), cubbyhole::Error> {
    /// let progress = sandbox.on_event("progress", |event| println!("{}", event.data)).await?;
    /// let program = r#"
    /// import json, socket
    /// agent = socket.socket(socket.AF_UNIX)
    /// agent.connect("/run/agent.sock")
    /// agent.sendall(b'{"event":"progress","data":{"percent":42}}\n')"#;
    /// sandbox.exec("python3", ["-c", program]).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// `call` runs on a task of the runtime: it must not block. Who has more to do uses [`Self::events`]. One that is
    /// too slow loses events, which [`Subscription::dropped`] counts, and delays nobody else.
    ///
    /// A subscription is an open session: it holds the idle time-out. A drain does not wait for it.
    pub async fn on_event(
        &self,
        event: impl AsRef<str>,
        call: impl FnMut(Event) + Send + 'static,
    ) -> R<Subscription> {
        Ok(Subscription::start(self.events(event).await?, call))
    }

    /// The events of this name, or with `"*"` all, as a stream; otherwise as [`Self::on_event`].
    pub async fn events(&self, event: impl AsRef<str>) -> R<EventStream> {
        EventStream::open(&self.link, event.as_ref()).await
    }
}

/// Hands one event to the guest's processes.
async fn emit(link: &Link, event: &str, data: &(impl Serialize + ?Sized)) -> R<()> {
    let line = line(event, data).map_err(|why| Error::BadEvent { event: event.into(), why })?;
    let connection = link.connection("emit").await?;
    match connection.ask(Kind::Emit, line.as_bytes()).await {
        Ok(answer) => match answer.kind {
            Kind::Emitted => Ok(()),
            Kind::Refused => Err(Error::refused(link.name(), "emit", decode(&answer.payload)?)),
            kind => Err(Error::unexpected(kind)),
        },
        Err(error) => Err(link.lost(error, "emit").await),
    }
}

/// An event as its readers find it.
fn line(event: &str, data: &(impl Serialize + ?Sized)) -> Result<String, EventFault> {
    #[derive(Serialize)]
    struct Line<'a, D: ?Sized> {
        event: &'a str,
        data: &'a D,
    }
    if !(1..=MAX_EVENT_NAME).contains(&event.len()) {
        return Err(EventFault::Name { max: MAX_EVENT_NAME });
    }
    let line = serde_json::to_string(&Line { event, data })
        .map_err(|error| EventFault::NotJson(error.to_string()))?;
    match line.len() {
        ..=MAX_EVENT => Ok(line),
        size => Err(EventFault::TooLong { size, max: MAX_EVENT }),
    }
}

/// Events of the guest as they come ([`Sandbox::events`]). Dropping it ends the subscription.
///
/// What nobody takes waits here and in the guest, about 1.5 MiB of it; what comes then is lost and counted.
pub struct EventStream {
    session: Session,
    link: Arc<Link>,
    /// The name that was asked for; without one, any.
    name: Option<String>,
    /// Bytes taken by the caller for which no credit was given back yet.
    owed: u32,
    dropped: Arc<AtomicU64>,
    ended: bool,
}

impl EventStream {
    /// Subscribes, and waits until the agent knows.
    async fn open(link: &Arc<Link>, event: &str) -> R<Self> {
        const OPERATION: &str = "subscribe";
        let name = (event != ALL).then(|| event.to_owned());
        let connection = link.connection(OPERATION).await?;
        let subscribe = Subscribe { name: name.clone() };
        let session = match connection.start_session(Kind::Subscribe, &subscribe).await {
            Ok(session) => session,
            Err(error) => return Err(link.lost(error, OPERATION).await),
        };
        // From here on its end is seen to, if this is called off as well.
        let mut events =
            Self { session, link: link.clone(), name, owed: 0, dropped: Arc::default(), ended: false };
        let first = match events.session.next().await {
            Ok(first) => first,
            Err(error) => return Err(link.lost(error, OPERATION).await),
        };
        match first.kind {
            Kind::Subscribed => Ok(events),
            Kind::Refused => Err(Error::refused(link.name(), OPERATION, decode(&first.payload)?)),
            kind => Err(Error::unexpected(kind)),
        }
    }

    /// The next event. At the end of the sandbox or of the connection it is an error that says so, and then `None`.
    /// Nothing is lost when the future is dropped before it is ready.
    pub async fn next(&mut self) -> Option<R<Event>> {
        while !self.ended {
            let received = match self.session.next().await {
                Ok(incoming) if incoming.kind == Kind::Event => self.take(&incoming.payload),
                Ok(incoming) => Err(Error::unexpected(incoming.kind)),
                Err(error) => Err(self.link.lost(error, "events").await),
            };
            match received {
                Ok(None) => {}
                Ok(Some(event)) => return Some(Ok(event)),
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }

    /// How many events were lost, because nobody took them in time or because they were none.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn take(&mut self, payload: &Bytes) -> R<Option<Event>> {
        self.owed = self.owed.saturating_add(u32::try_from(payload.len()).unwrap_or(u32::MAX));
        // A quarter is kept back at most, so that the longest event always fits into the rest.
        if self.owed >= INITIAL_WINDOW / 4 {
            self.session.out.push(Kind::Credit, &Credit { bytes: std::mem::take(&mut self.owed) });
        }
        let (event, lost) = read(payload, self.name.as_deref())?;
        // The guest may count as it likes.
        let before = self.dropped.load(Ordering::Relaxed);
        self.dropped.store(before.saturating_add(lost), Ordering::Relaxed);
        Ok(event)
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        // Of a session that is over already nobody takes any notice.
        self.session.out.push(Kind::Unsubscribe, &());
    }
}

/// What the agent has sent: an event, if it is one and of the right name, and how many were lost.
fn read(payload: &[u8], wanted: Option<&str>) -> R<(Option<Event>, u64)> {
    let message: message::Event<'_> = decode(payload)?;
    if message.line.is_empty() {
        return Ok((None, message.dropped));
    }
    let event = serde_json::from_str::<Event>(&message.line);
    let event = event.ok().filter(|event| wanted.is_none_or(|wanted| event.name == wanted));
    let lost = message.dropped.saturating_add(u64::from(event.is_none()));
    Ok((event, lost))
}

/// Events that go to a function ([`Sandbox::on_event`]) until this is dropped.
#[must_use = "dropping a subscription ends it"]
pub struct Subscription {
    task: JoinHandle<()>,
    dropped: Arc<AtomicU64>,
}

impl Subscription {
    fn start(mut events: EventStream, mut call: impl FnMut(Event) + Send + 'static) -> Self {
        let dropped = events.dropped.clone();
        let task = tokio::spawn(async move {
            // The end of the sandbox is for others to tell.
            while let Some(Ok(event)) = events.next().await {
                call(event);
            }
        });
        Self { task, dropped }
    }

    /// How many events were lost, because the function was too slow or because they were none.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Whether no event will come any more: the sandbox or the connection has ended, or the function has panicked.
    pub fn is_over(&self) -> bool {
        self.task.is_finished()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use cubby_protocol::SessionId;
    use serde_json::json;

    use super::*;

    #[test]
    fn an_event_is_one_line_of_json() {
        assert_eq!(
            line("go", &json!({"a": [1, "é\n"]})).unwrap(),
            r#"{"event":"go","data":{"a":[1,"é\n"]}}"#
        );
        assert_eq!(line("q\"\n", "x").unwrap(), r#"{"event":"q\"\n","data":"x"}"#);
        assert_eq!(line("none", &()).unwrap(), r#"{"event":"none","data":null}"#);
    }

    #[test]
    fn an_event_that_cannot_be_says_why() {
        assert_eq!(line("", &()), Err(EventFault::Name { max: 256 }));
        assert_eq!(line(&"n".repeat(257), &()), Err(EventFault::Name { max: 256 }));
        // 24 bytes are not data.
        let most = MAX_EVENT - r#"{"event":"n","data":""}"#.len();
        assert_eq!(line("n", &"x".repeat(most)).unwrap().len(), MAX_EVENT);
        let too_long = line("n", &"x".repeat(most + 1));
        assert_eq!(too_long, Err(EventFault::TooLong { size: MAX_EVENT + 1, max: MAX_EVENT }));
        let no_json = line("n", &HashMap::from([((1, 2), 3)]));
        assert!(matches!(no_json, Err(EventFault::NotJson(why)) if why.contains("string")));
    }

    fn payload(dropped: u64, line: &str) -> Vec<u8> {
        let mut frame = Vec::new();
        let event = message::Event { dropped, line: line.into() };
        cubby_protocol::encode(Kind::Event, SessionId(1), &event, &mut frame).unwrap();
        frame.split_off(cubby_protocol::Header::SIZE)
    }

    #[test]
    fn what_the_guest_sends_is_read_with_care() {
        let good = read(&payload(2, r#"{"event":"a","data":[1],"more":0}"#), None).unwrap();
        assert_eq!(good, (Some(Event { name: "a".into(), data: json!([1]) }), 2));
        assert_eq!(read(&payload(7, ""), None).unwrap(), (None, 7));
        assert_eq!(read(&payload(0, r#"{"event":"a"}"#), Some("a")).unwrap().0.unwrap().data, Value::Null);
        for (line, wanted) in [
            (r#"{"event":"b"}"#, Some("a")),
            (r#"{"event":1}"#, None),
            ("[]", None),
            ("{", None),
            (r#"{"event":"a","data":"\ud800"}"#, None),
            (&format!(r#"{{"event":"a","data":{}"#, "[".repeat(100_000)), None),
        ] {
            assert_eq!(read(&payload(u64::MAX, line), wanted).unwrap(), (None, u64::MAX), "{line}");
            assert_eq!(read(&payload(1, line), wanted).unwrap(), (None, 2));
        }
        for broken in [&[][..], &[0, 5, b'x'], &[0, 1, 0xff], &[0, 0, 0]] {
            assert!(matches!(read(broken, None), Err(Error::Process { .. })), "{broken:?}");
        }
    }
}
