package internal

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	testFunc  = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)\w*)\(`)
	namedTest = regexp.MustCompile("`(?:(\\w+)\\.)?((?:Test|Fuzz|Benchmark)\\w*)(?:/([^`]+))?`")
)

// testsOf maps each directory with tests to the text of all its test files.
func testsOf(t *testing.T) map[string]string {
	t.Helper()
	texts := make(map[string]string)
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		texts[filepath.Dir(path)] += string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return texts
}

// Pages that say which test shows what name tests that exist: functions, in the
// package named if one is, and subtests by a string in the same package.
func TestNamedTestsExist(t *testing.T) {
	texts := testsOf(t)
	declared := make(map[string][]string) // directories by test
	for dir, text := range texts {
		for _, m := range testFunc.FindAllStringSubmatch(text, -1) {
			declared[m[1]] = append(declared[m[1]], dir)
		}
	}
	exists := func(pkg, name, sub string) bool {
		return slices.ContainsFunc(declared[name], func(dir string) bool {
			return (pkg == "" || filepath.Base(dir) == pkg) && (sub == "" || strings.Contains(texts[dir], `"`+sub+`"`))
		})
	}
	if len(declared) < 100 {
		t.Fatalf("only %d tests were found", len(declared))
	}
	for page, least := range map[string]int{"../docs/rfc.md": 50, "../docs/peers.md": 30, "../docs/coexistence.md": 3} {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		found := make(map[string]bool)
		for _, m := range namedTest.FindAllStringSubmatch(string(text), -1) {
			found[m[0]] = true
			if !exists(m[1], m[2], m[3]) {
				t.Errorf("%s: there is no test %s", page, m[0])
			}
		}
		if len(found) < least {
			t.Errorf("%s names %d tests: %v", page, len(found), slices.Sorted(maps.Keys(found)))
		}
	}
}

// Every requirement and lettered part has its row, a verdict that the page explains,
// and a test if we say yes.
func TestRequirementsAreAnswered(t *testing.T) {
	text, err := os.ReadFile("../docs/rfc.md")
	if err != nil {
		t.Fatal(err)
	}
	verdicts := []string{"yes", "partly", "no", "deliberately not", "n/a"}
	rows := make(map[string]map[string]bool) // by heading
	heading := ""
	for _, line := range strings.Split(string(text), "\n") {
		if h, ok := strings.CutPrefix(line, "## "); ok {
			heading, _, _ = strings.Cut(h, ":")
			rows[heading] = make(map[string]bool)
		}
		cells := strings.Split(line, "|")
		if len(cells) != 7 || heading == "" || strings.HasPrefix(line, "|---") || strings.Contains(cells[2], "asks") {
			continue
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		for _, number := range strings.Split(cells[1], ",") {
			rows[heading][strings.TrimSpace(number)] = true
		}
		verdict, why, tests := cells[3], cells[4], cells[5]
		switch {
		case !slices.Contains(verdicts, verdict):
			t.Errorf("%s, %s: verdict %q", heading, cells[1], verdict)
		case verdict == "yes" && !namedTest.MatchString(tests):
			t.Errorf("%s, %s: yes, but no test", heading, cells[1])
		case verdict != "yes" && why == "" && cells[2] != "":
			t.Errorf("%s, %s: %s, but no reason", heading, cells[1], verdict)
		}
	}
	for rfc, numbers := range map[string]string{
		"RFC 4787": "1 2 3 3a 4 5 5a 5b 5c 6 6a 7 8 8a 9 9a 10 10a 11 12 12a 12b 13 13a 14 14a",
		"RFC 5382": "1 2 2a 3 3a 3b 4 4a 5 5a 6 7 8 8a 9 10",
		"RFC 5508": "1 1a 2 2a 3 3a 3b 3c 3d 4 4a 4b 4c 5 5a 5b 5c 6 7 7a 8 9 10 10a 10b 10c 10d 10e 10f 11",
		"RFC 6888": "1 1a 1b 1c 1d 2 3 4 4a 4b 4c 5 5a 5b 6 7 8 8a 8b 8c 9 10 11 11a 11b 11c 11d 12 13 14 15",
		"RFC 7857": "2 2.1 2.2 3 4 5 6 7 7.1 8 9 10 11 12", // sections
	} {
		want := strings.Fields(numbers)
		for _, number := range want {
			if !rows[rfc][number] {
				t.Errorf("%s: no row for %s", rfc, number)
			}
		}
		if len(rows[rfc]) != len(want) {
			t.Errorf("%s: rows for %v, want %v", rfc, slices.Sorted(maps.Keys(rows[rfc])), want)
		}
	}
}
