package config

import (
	"maps"
	"slices"
)

// unknown is the error for a name that is no option.
func unknown(source, name string) error {
	e := &Error{Msg: source + ": no such option"}
	if like := nearest(name, slices.Collect(maps.Keys(allNames()))); like != "" {
		e.Hints = append(e.Hints, "did you mean "+like+"?")
	} else {
		e.Hints = append(e.Hints, "bauta agent --help lists the options")
	}
	return e
}

// nearest returns the name that differs from word in the fewest letters, if
// that is few enough to be a slip.
func nearest(word string, names []string) string {
	const slip = 2
	best, like := slip+1, ""
	slices.Sort(names)
	for _, name := range names {
		if d := distance(word, name); d < best {
			best, like = d, name
		}
	}
	return like
}

// distance is Levenshtein's: insertions, deletions and replacements.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
