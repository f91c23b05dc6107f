//! What SPEC.md promises in instruction time. A run on the instruction clock fails when it breaks one of them.

use crate::Report;

/// The medians of some series, in milliseconds, and the most that their sum may be.
struct Promise {
    /// How its row in SPEC.md begins.
    row: &'static str,
    series: &'static [&'static str],
    most_ms: f64,
}

const PROMISES: [Promise; 12] = [
    promise("create to ready", &["create"], 80.0),
    promise(
        "… of which the VMM",
        &["create, no network: kvm", "create, no network: load", "create, no network: devices"],
        5.0,
    ),
    promise("… and with one", &["create: kvm", "create: load", "create: devices"], 5.6),
    promise("`exec` of `true`", &["exec true"], 0.81),
    promise("first byte of a shell's output", &["shell first byte"], 1.0),
    promise("stop, nothing running", &["stop"], 15.0),
    promise("kill", &["kill"], 5.0),
    promise("ping", &["ping"], 0.08),
    promise("pause", &["pause"], 0.15),
    promise("resume", &["resume"], 0.1),
    promise("the first pause; the first resume", &["pause, first"], 0.2),
    promise("the first pause; the first resume", &["resume, first"], 0.2),
];

const fn promise(row: &'static str, series: &'static [&'static str], most_ms: f64) -> Promise {
    Promise { row, series, most_ms }
}

/// A line for each promise that a run on the instruction clock broke, or did not measure.
pub fn broken_promises(report: &Report) -> Vec<String> {
    let broken = PROMISES.iter().filter_map(|promise| {
        let medians = promise.series.iter().map(|name| report.get(name).map(|summary| summary.p50_ms));
        let Promise { row, series, most_ms } = promise;
        match medians.sum::<Option<f64>>() {
            Some(sum) if sum <= *most_ms => None,
            Some(sum) => {
                Some(format!("{row}: {} took {sum:.3} ms, promised are {most_ms}", series.join(" + ")))
            }
            None => Some(format!("{row}: {} was not measured", series.join(" + "))),
        }
    });
    broken.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Samples;
    use std::time::Duration;

    #[test]
    fn what_is_over_or_missing_is_named_and_nothing_else() {
        let mut samples = Samples::default();
        for name in PROMISES.iter().flat_map(|promise| promise.series).filter(|name| **name != "kill") {
            samples.add(name, Duration::from_micros(if *name == "ping" { 81 } else { 40 }));
        }
        let broken = broken_promises(&samples.report("instructions"));
        let expected = ["kill: kill was not measured", "ping: ping took 0.081 ms, promised are 0.08"];
        assert_eq!(broken, expected);
    }

    #[test]
    fn they_are_those_of_the_specification() {
        let specification = include_str!("../../SPEC.md");
        for Promise { row, most_ms, .. } in &PROMISES {
            let line = specification.lines().find(|line| line.starts_with(&format!("| {row}")));
            let number = format!("≤ {most_ms} ms instruction time");
            assert!(line.is_some_and(|line| line.contains(&number)), "{row}: {number}\n{line:?}");
        }
    }
}
