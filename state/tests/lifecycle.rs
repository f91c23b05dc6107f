//! The table against the documentation, and against a model of what the lifecycle promises.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::expect_used)]

use cubby_state::{Event, ExitReason, Next, Refused, Status};
use proptest::prelude::*;

const PAGE: &str = include_str!("../../docs/lifecycle.md");

fn cells(line: &str) -> Vec<&str> {
    line.trim_matches('|').split('|').map(str::trim).collect()
}

#[test]
fn the_documentation_shows_the_table() {
    let mut lines = PAGE.lines().skip_while(|line| !line.starts_with("| event |"));
    let header = cells(lines.next().unwrap());
    let statuses: Vec<Status> = header[1..].iter().map(|cell| cell.parse().unwrap()).collect();
    assert_eq!(statuses, Status::ALL);
    let rows: Vec<Vec<&str>> = lines.skip(1).take_while(|line| line.starts_with('|')).map(cells).collect();
    assert_eq!(rows.iter().map(|row| row[0]).collect::<Vec<_>>(), Event::ALL.map(Event::as_str));
    for (event, row) in Event::ALL.into_iter().zip(rows) {
        for (status, cell) in statuses.iter().zip(&row[1..]) {
            let shown = match status.after(event) {
                Ok(Next::Status(next)) => next.as_str(),
                Ok(Next::Gone) => "gone",
                Err(refused) => {
                    assert_eq!(refused, Refused { status: *status, event });
                    "–"
                }
            };
            assert_eq!(*cell, shown, "{event} in {status}");
        }
    }
}

#[test]
fn every_status_is_listed_and_has_a_name() {
    for status in Status::ALL {
        assert_eq!(status.to_string().parse::<Status>().unwrap(), status);
        assert_eq!(serde_json::to_string(&status).unwrap(), format!("\"{status}\""));
        assert!(PAGE.contains(&format!("| {status} |")), "{status}");
    }
    assert!("running".parse::<Status>().is_err());
}

/// From every status, what is reachable by the events in `by`.
fn reach(from: Status, by: &[Event]) -> Vec<Status> {
    let mut found = vec![from];
    let mut i = 0;
    while let Some(status) = found.get(i).copied() {
        for event in by {
            if let Ok(Next::Status(next)) = status.after(*event)
                && !found.contains(&next)
            {
                found.push(next);
            }
        }
        i += 1;
    }
    found
}

#[test]
fn every_status_reaches_its_end_without_luck() {
    for status in Status::ALL.into_iter().filter(|status| status.is_live()) {
        // Gracefully; at once; and without anybody's help.
        let graceful = reach(status, &[Event::Stop, Event::PoweredOff]);
        assert!(graceful.contains(&Status::Stopped), "{status}");
        assert_eq!(status.after(Event::Kill), Ok(Next::Status(Status::Stopped)));
        assert_eq!(status.after(Event::Crash), Ok(Next::Status(Status::Crashed)));
        let alone = reach(status, &[Event::LifetimeExpired, Event::PoweredOff]);
        assert!(alone.contains(&Status::Stopped), "{status}");
    }
    for status in [Status::Stopped, Status::Crashed] {
        assert_eq!(status.after(Event::Remove), Ok(Next::Gone));
        for event in Event::ALL {
            assert_eq!(status.after(event).is_ok(), matches!(event, Event::Start | Event::Remove), "{event}");
        }
    }
}

#[test]
fn draining_leads_nowhere_but_to_an_end() {
    for event in Event::ALL {
        let Ok(next) = Status::Draining.after(event) else { continue };
        assert!(
            matches!(next, Next::Status(Status::Draining | Status::Stopped | Status::Crashed)),
            "{event} led to {next:?}"
        );
    }
    assert!(Status::Draining.after(Event::Open).is_err());
}

/// What the promises say about a sandbox, in other words than the table's.
#[derive(Default)]
struct Model {
    process: bool,
    ready: bool,
    frozen: bool,
    ending: bool,
    crashed: bool,
    gone: bool,
    /// Sessions that were accepted and have not finished.
    open: u32,
    finished: u32,
    lost: u32,
    accepted: u32,
}

impl Model {
    fn status(&self) -> Status {
        match (self.process, self.ending, self.frozen, self.ready) {
            (false, ..) if self.crashed => Status::Crashed,
            (false, ..) => Status::Stopped,
            (_, true, ..) => Status::Draining,
            (_, _, true, _) => Status::Paused,
            (.., true) => Status::Running,
            _ => Status::Creating,
        }
    }

    fn serves(&self) -> bool {
        self.process && self.ready && !self.frozen && !self.ending
    }

    fn allows(&self, event: Event) -> bool {
        let runs = self.process && !self.frozen;
        match event {
            Event::Open | Event::Pause | Event::IdleExpired => self.serves(),
            Event::Resume => self.process && self.frozen,
            Event::Drain => self.process && (self.ready || self.ending),
            Event::Detach | Event::Stop | Event::Kill | Event::LifetimeExpired | Event::Crash => self.process,
            Event::Start | Event::Remove => !self.process && !self.gone,
            Event::Ready | Event::BootFailed => runs && (!self.ready || self.ending),
            Event::PoweredOff => runs && (self.ready || self.ending),
        }
    }

    fn end(&mut self, crashed: bool) {
        self.lost += std::mem::take(&mut self.open);
        let Model { finished, lost, accepted, .. } = *self;
        *self = Model { crashed, finished, lost, accepted, ..Self::default() };
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Open => {
                self.open += 1;
                self.accepted += 1;
            }
            Event::Pause => self.frozen = true,
            Event::Resume => self.frozen = false,
            Event::Detach => {}
            Event::Drain | Event::Stop | Event::IdleExpired | Event::LifetimeExpired => {
                self.frozen = false;
                self.ending = true;
            }
            Event::Ready => self.ready = true,
            Event::Kill | Event::PoweredOff => self.end(false),
            Event::BootFailed | Event::Crash => self.end(true),
            Event::Start => self.process = true,
            Event::Remove => self.gone = true,
        }
    }
}

/// One step: an event, or `None` for a session that finishes.
fn step() -> impl Strategy<Value = Option<Event>> {
    prop_oneof![
        4 => Just(Some(Event::Open)),
        4 => Just(None),
        3 => Just(Some(Event::Start)),
        3 => Just(Some(Event::Ready)),
        8 => proptest::sample::select(&Event::ALL[..]).prop_map(Some),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn random_lives_keep_the_promises(steps in proptest::collection::vec(step(), 0..200)) {
        let mut status = Status::Creating;
        let mut model = Model { process: true, ..Model::default() };
        for step in steps {
            let Some(event) = step else {
                // A session finishes while the guest runs, draining included.
                if model.open > 0 && !model.frozen {
                    model.open -= 1;
                    model.finished += 1;
                }
                continue;
            };
            let result = status.after(event);
            prop_assert_eq!(result.is_ok(), model.allows(event), "{} in {}", event, status);
            let Ok(next) = result else { continue };
            prop_assert!(!(model.ending && event == Event::Open), "accepted after drain");
            model.apply(event);
            prop_assert_eq!(model.accepted, model.open + model.finished + model.lost);
            match next {
                Next::Gone => return Ok(()),
                Next::Status(next) => {
                    prop_assert_eq!(next, model.status(), "{} in {}", event, status);
                    status = next;
                }
            }
        }
        // Whatever happened, it can be ended, and then removed.
        if status.is_live() {
            status = ExitReason::Killed.status();
            model.apply(Event::Kill);
        }
        prop_assert_eq!(model.open, 0);
        prop_assert_eq!(status.after(Event::Remove), Ok(Next::Gone));
    }
}
