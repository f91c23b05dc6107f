//! Where a boot's time goes, as one bar: an SVG without scripts or fonts of its own.

use crate::Summary;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 20.0;
const COLOURS: [&str; 10] = [
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f", "#bab0ac",
    "#86bc86",
];

/// The steps of a boot side by side, as wide as their medians, with a line of text for each.
pub fn boot_picture(clock: &str, steps: &[&Summary]) -> String {
    let total: f64 = steps.iter().map(|step| step.p50_ms).sum();
    let scale = (WIDTH - 2.0 * LEFT) / total.max(f64::MIN_POSITIVE);
    let (mut bars, mut legend) = (String::new(), String::new());
    let mut x = LEFT;
    for (index, (step, colour)) in steps.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let width = step.p50_ms * scale;
        bars.push_str(&format!(
            r#"<rect x="{x:.1}" y="50" width="{width:.1}" height="60" fill="{colour}"/>"#
        ));
        let row = 140 + 20 * index;
        legend.push_str(&format!(
            r#"<rect x="{LEFT}" y="{}" width="12" height="12" fill="{colour}"/><text x="40" y="{row}">{:8.2} ms  {}</text>"#,
            row - 11, step.p50_ms, step.name
        ));
        x += width;
    }
    let height = 150 + 20 * steps.len();
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="monospace" font-size="13"><rect width="100%" height="100%" fill="#fff"/><text x="{LEFT}" y="30" font-size="16">create to ready: {total:.1} ms ({clock} clock, medians)</text>{bars}{legend}</svg>
"##
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_in_proportion_and_fill_the_line() {
        let step =
            |name: &str, p50_ms| Summary { name: name.into(), count: 1, p50_ms, p99_ms: 0.0, min_ms: 0.0 };
        let picture = boot_picture("wall", &[&step("a", 30.0), &step("b", 10.0)]);
        assert!(picture.contains(r#"width="690.0""#) && picture.contains(r#"width="230.0""#), "{picture}");
        assert!(picture.contains("40.0 ms"));
    }
}
