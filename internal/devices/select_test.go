package devices

import (
	"fmt"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// TestSelect runs the cases of testdata/select.txt; parse_test.go has the format.
// Of each kind of line that a case expects, all lines must be as expected.
func TestSelect(t *testing.T) {
	text, err := os.ReadFile("testdata/select.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range parseCases(t, string(text)) {
		t.Run(c.name, func(t *testing.T) {
			got := render(Select(c.host, c.options))
			for kind, want := range c.want {
				if want, got := strings.Join(want, "\n"), strings.Join(orNone(kind, got[kind]), "\n"); want != got {
					t.Errorf("line %d:\ngot\n%s\nwant\n%s", c.line, got, want)
				}
			}
		})
	}
}

// What the kernel lists in no particular order must not matter; the order of the
// addresses of one device does.
func TestSelectIsDeterministic(t *testing.T) {
	text, err := os.ReadFile("testdata/select.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range parseCases(t, string(text)) {
		want := Select(c.host, c.options)
		for seed := range uint64(20) {
			r := rand.New(rand.NewPCG(seed, 0))
			s := Snapshot{slices.Clone(c.host.Links), slices.Clone(c.host.Addrs), slices.Clone(c.host.Routes), nil}
			r.Shuffle(len(s.Links), reflect.Swapper(s.Links))
			rank := r.Perm(100)
			slices.SortStableFunc(s.Addrs, func(a, b Addr) int { return rank[a.Index] - rank[b.Index] })
			r.Shuffle(len(s.Routes), reflect.Swapper(s.Routes))
			if got := Select(s, c.options); !reflect.DeepEqual(got, want) {
				t.Fatalf("%s: seed %d:\ngot  %+v\nwant %+v", c.name, seed, got, want)
			}
		}
	}
}

// render returns the lines of a selection by their first word.
func render(sel Selection) map[string][]string {
	lines := make(map[string][]string)
	add := func(kind, format string, args ...any) {
		lines[kind] = append(lines[kind], kind+" "+fmt.Sprintf(format, args...))
	}
	for _, d := range sel.Devices {
		add("device", "%s: %s", d.Name, d.Reason)
		add("ipv4", "%s %s: %s", d.Name, d.IPv4, d.Why4)
		add("ipv6", "%s %s: %s", d.Name, d.IPv6, d.Why6)
		add("link", "%s ethernet=%t up=%t", d.Name, d.Ethernet, d.Up)
		for _, b := range d.Broadcasts {
			add("broadcast", "%s %s", d.Name, b)
		}
	}
	for _, s := range sel.Skipped {
		add("skip", "%s: %s", s.Name, s.Reason)
	}
	for _, m := range sel.Missing {
		add("missing", "%s", m)
	}
	for _, u := range sel.Unmatched {
		add("unmatched", "%s", u)
	}
	for _, a := range sel.HostAddrs {
		add("host", "%s", a)
	}
	for _, r := range sel.RouteSources {
		add("source", "%s %s", r.Prefix, r.Source)
	}
	if sel.DefaultRoute4 {
		add("default", "IPv4")
	}
	if sel.DefaultRoute6 {
		add("default", "IPv6")
	}
	return lines
}

func orNone(kind string, lines []string) []string {
	if len(lines) == 0 {
		return []string{kind + " none"}
	}
	return lines
}
