package ipmasq

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"bauta.dev/bauta/internal/policy"
)

const (
	ll    = "169.254.0.0/16 fe80::/10"
	eight = "100.64.0.0/10 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4"
	three = "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16"
)

// want is the result under one profile: "STATE PREFIX..." in any order, a word
// "warns" for at least one warning, or "error: TEXT" with a part of the message.
type want string

// rows follow the table of section 5. An empty want is that of profile cilium.
var rows = []struct {
	name                     string
	file                     string
	cilium, upstream, strict want
}{
	{name: "zero bytes", file: "",
		cilium: "empty " + three + " " + eight + " " + ll, upstream: "empty " + three + " " + ll},
	{name: "only blanks", file: "  \n\n \t  \r\n",
		cilium: "blank warns " + three + " " + eight + " " + ll, upstream: "blank warns " + three + " " + ll},
	{name: "only comments", file: "# nothing\n  # here\n---\n",
		cilium: "blank warns " + three + " " + eight + " " + ll, upstream: "blank warns " + three + " " + ll},
	{name: "only a byte order mark", file: "\uFEFF",
		cilium: "blank warns " + three + " " + eight + " " + ll, upstream: "blank warns " + three + " " + ll},
	{name: "list absent", file: "masqLinkLocal: false\n",
		cilium: "no-cidrs warns " + ll, upstream: "no-list " + three + " " + ll},
	{name: "empty mapping", file: "{}",
		cilium: "no-cidrs warns " + ll, upstream: "no-list " + three + " " + ll},
	{name: "list null", file: "nonMasqueradeCIDRs:\n", cilium: "no-cidrs warns " + ll},
	{name: "list empty", file: `{"nonMasqueradeCIDRs": []}`, cilium: "no-cidrs warns " + ll},
	{name: "no list, link-local masqueraded", file: "masqLinkLocal: true\nmasqLinkLocalIPv6: true",
		cilium: "no-cidrs warns", upstream: "no-list " + three},
	{name: "a list", file: "nonMasqueradeCIDRs:\n- 10.0.0.0/8\n- fd00::/8\n", cilium: "list 10.0.0.0/8 fd00::/8 " + ll},
	{name: "JSON", file: "{\n\t\"nonMasqueradeCIDRs\": [\"10.0.0.0/8\"],\n\t\"masqLinkLocal\": true}", cilium: "list 10.0.0.0/8 fe80::/10"},
	{name: "CRLF and byte order mark", file: "\uFEFFnonMasqueradeCIDRs:\r\n  - 10.0.0.0/8\r\nmasqLinkLocal: yes\r\n", cilium: "list 10.0.0.0/8 fe80::/10"},
	{name: "everything", file: "nonMasqueradeCIDRs: \n- 0.0.0.0/0\n- ::/0", cilium: "list 0.0.0.0/0 ::/0 " + ll},
	{name: "link-local listed and masqueraded", file: "nonMasqueradeCIDRs: [169.254.0.0/16]\nmasqLinkLocal: true\n", cilium: "list " + ll},
	{name: "repeated", file: "nonMasqueradeCIDRs: [10.0.0.0/8, 10.0.0.0/8, 10.0.0.0/9]", cilium: "list 10.0.0.0/8 10.0.0.0/9 " + ll},
	{name: "one address", file: "nonMasqueradeCIDRs: [10.1.2.3/32]", cilium: "list 10.1.2.3/32 " + ll},
	{name: "host bits", file: "nonMasqueradeCIDRs: [10.0.0.1/8]", cilium: "list warns 10.0.0.0/8 " + ll,
		upstream: `error: f: nonMasqueradeCIDRs[0]: "10.0.0.1/8": bits are set behind the prefix length (write 10.0.0.0/8)`,
		strict:   "error: (write 10.0.0.0/8)"},
	{name: "host bits, IPv6", file: "nonMasqueradeCIDRs: ['fd00::1/8']", cilium: "list warns fd00::/8 " + ll,
		upstream: "error: (write fd00::/8)", strict: "error: (write fd00::/8)"},
	{name: "bad CIDR", file: "nonMasqueradeCIDRs: [10.0.0.0/8, 10.1.0.0/16, 10.0.0/8]",
		cilium: `error: f: nonMasqueradeCIDRs[2]: "10.0.0/8": not a CIDR`},
	{name: "octet 256", file: "nonMasqueradeCIDRs: [10.256.0.0/16]", cilium: `error: [0]: "10.256.0.0/16": not a CIDR`},
	{name: "length 33", file: "nonMasqueradeCIDRs: [10.0.0.0/33]", cilium: "error: not a CIDR"},
	{name: "leading zero", file: "nonMasqueradeCIDRs: [10.0.0.0/08]", cilium: "error: not a CIDR",
		upstream: "list 10.0.0.0/8 " + ll},
	{name: "address", file: "nonMasqueradeCIDRs: [10.0.0.1]", cilium: "error: not a CIDR (write 10.0.0.1/32)"},
	{name: "zone", file: "nonMasqueradeCIDRs: ['fe80::%eth0/10']", cilium: "error: not a CIDR"},
	{name: "blank item", file: "nonMasqueradeCIDRs: ['', 10.0.0.0/8]", cilium: `error: [0]: "": not a CIDR`},
	{name: "IPv4-mapped", file: "nonMasqueradeCIDRs: ['::ffff:10.0.0.0/104']", cilium: "error: (write 10.0.0.0/8)"},
	{name: "IPv4-mapped, short", file: "nonMasqueradeCIDRs: ['::ffff:0:0/90']", cilium: "error: write it as IPv4"},
	{name: "null item", file: "nonMasqueradeCIDRs: [10.0.0.0/8, ~]", cilium: "error: f: nonMasqueradeCIDRs[1]: null"},
	{name: "empty item", file: "nonMasqueradeCIDRs:\n- \n", cilium: "error: nonMasqueradeCIDRs[0]: null"},
	{name: "number item", file: "nonMasqueradeCIDRs: [10]", cilium: "error: nonMasqueradeCIDRs[0]: 10: a number"},
	{name: "list is a string", file: "nonMasqueradeCIDRs: 10.0.0.0/8", cilium: `error: nonMasqueradeCIDRs: "10.0.0.0/8": a string, expected a list`},
	{name: "list is a mapping", file: "nonMasqueradeCIDRs: {a: b}", cilium: "error: nonMasqueradeCIDRs: a mapping"},
	{name: "boolean is a string", file: "masqLinkLocal: 'true'", cilium: `error: masqLinkLocal: "true": a string, expected true or false`},
	{name: "boolean is null", file: "nonMasqueradeCIDRs: [10.0.0.0/8]\nmasqLinkLocal:", cilium: "list 10.0.0.0/8 " + ll},
	{name: "root is a list", file: "- 10.0.0.0/8", cilium: "error: f: a list, expected the key nonMasqueradeCIDRs"},
	{name: "root is a string", file: "10.0.0.0/8", cilium: "error: f: "},
	{name: "bad YAML", file: "nonMasqueradeCIDRs: [10.0.0.0/8", cilium: "error: f: yaml: line 1"},
	{name: "binary", file: "\x00\x01\x02", cilium: "error: f: yaml"},
	{name: "one key twice", file: "nonMasqueradeCIDRs: [10.0.0.0/8]\nnonMasqueradeCIDRs: [10.1.0.0/16]", cilium: "error: already set"},
	{name: "one key in two cases", file: "nonMasqueradeCIDRs: [10.0.0.0/8]\nnonmasqueradecidrs: [10.1.0.0/16]", cilium: "error: one key twice",
		strict: "error: nonmasqueradecidrs: unknown key"},
	{name: "key in another case", file: "NonMasqueradeCidrs: [10.0.0.0/8]", cilium: "list 10.0.0.0/8 " + ll,
		strict: "error: NonMasqueradeCidrs: unknown key"},
	{name: "unknown key", file: "nonMasqueradeCIDRs: [10.0.0.0/8]\nmasqueradeAll: 1", cilium: "list 10.0.0.0/8 " + ll,
		strict: "error: masqueradeAll: unknown key"},
	{name: "resync interval", file: "nonMasqueradeCIDRs: [10.0.0.0/8]\nresyncInterval: 60s", cilium: "list 10.0.0.0/8 " + ll},
	{name: "resync interval is a number", file: "nonMasqueradeCIDRs: [10.0.0.0/8]\nresyncInterval: 60", cilium: "list 10.0.0.0/8 " + ll,
		upstream: "error: resyncInterval: 60: a number"},
	{name: "resync interval is no duration", file: "nonMasqueradeCIDRs: [10.0.0.0/8]\nresyncInterval: soon", cilium: "list 10.0.0.0/8 " + ll,
		upstream: `error: resyncInterval: "soon"`},
	{name: "within the limit", file: "nonMasqueradeCIDRs: [10.0.0.0/8, 10.0.0.0/8]\ncidrLimit: 2", cilium: "list 10.0.0.0/8 " + ll},
	{name: "above the limit", file: "nonMasqueradeCIDRs: [10.0.0.0/8, 11.0.0.0/8]\ncidrLimit: 1", cilium: "list 10.0.0.0/8 11.0.0.0/8 " + ll,
		upstream: "error: 2 CIDRs, more than cidrLimit 1"},
	{name: "bad limit", file: "nonMasqueradeCIDRs: [10.0.0.0/8]\ncidrLimit: many", cilium: "list 10.0.0.0/8 " + ll,
		upstream: `error: cidrLimit: "many"`},
	{name: "two documents", file: "nonMasqueradeCIDRs: [10.0.0.0/8]\n---\nmasqLinkLocal: true\n", cilium: "list warns 10.0.0.0/8 " + ll,
		strict: "error: more than one YAML document"},
	{name: "marked document", file: "# c\n---\nnonMasqueradeCIDRs:\n- 10.0.0.0/8\n---\n", cilium: "list 10.0.0.0/8 " + ll},
}

func TestTable(t *testing.T) {
	for _, row := range rows {
		for p, w := range map[Profile]want{Cilium: row.cilium, Upstream: row.upstream, Strict: row.strict} {
			if w == "" {
				w = row.cilium
			}
			t.Run(row.name+"/"+string(p), func(t *testing.T) {
				l, err := Parse([]Fragment{{"f", []byte(row.file)}}, p)
				compare(t, w, l, err)
			})
		}
	}
}

func compare(t *testing.T, w want, l List, err error) {
	t.Helper()
	if text, ok := strings.CutPrefix(string(w), "error: "); ok {
		if err == nil || !strings.Contains(err.Error(), text) || !strings.HasPrefix(err.Error(), "f: ") {
			t.Fatalf("error %v, want f: ... %s", err, text)
		}
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("error of several lines: %q", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(w))
	if l.State != State(fields[0]) {
		t.Errorf("state %s, want %s", l.State, fields[0])
	}
	wantPrefixes := slices.DeleteFunc(fields[1:], func(f string) bool { return f == "warns" })
	if warns := len(wantPrefixes) < len(fields)-1; warns != (len(l.Warnings) > 0) {
		t.Errorf("warnings %q, want some: %t", l.Warnings, warns)
	}
	slices.Sort(wantPrefixes)
	if diff := cmp.Diff(slices.Compact(wantPrefixes), prefixTexts(l), cmp.Transformer("empty", func(s []string) string { return fmt.Sprint(s) })); diff != "" {
		t.Error(diff)
	}
}

func prefixTexts(l List) []string {
	texts := []string{}
	for _, p := range l.Prefixes() {
		texts = append(texts, p.String())
	}
	slices.Sort(texts)
	return texts
}

func TestFragmentsMerge(t *testing.T) {
	f := func(texts ...string) (fs []Fragment) {
		for i, text := range texts {
			fs = append(fs, Fragment{string(rune('a' + i)), []byte(text)})
		}
		return fs
	}
	for _, c := range []struct {
		name      string
		fragments []Fragment
		profile   Profile
		want      string // state, then prefix=origin
	}{
		{"none", nil, Upstream, "missing 10.0.0.0/8=default 169.254.0.0/16=default 172.16.0.0/12=default 192.168.0.0/16=default fe80::/10=default"},
		{"lists", f("nonMasqueradeCIDRs: [10.0.0.0/8]", "nonMasqueradeCIDRs: [11.0.0.0/8, 10.0.0.0/8]"), Cilium,
			"list 10.0.0.0/8=file a 11.0.0.0/8=file b 169.254.0.0/16=default fe80::/10=default"},
		{"booleans", f("nonMasqueradeCIDRs: [10.0.0.0/8]\nmasqLinkLocal: false", "masqLinkLocal: true", "masqLinkLocalIPv6: true"), Cilium,
			"list 10.0.0.0/8=file a"},
		{"list with blank and empty", f("# none", "", "nonMasqueradeCIDRs: [10.0.0.0/8]"), Cilium,
			"list 10.0.0.0/8=file c 169.254.0.0/16=default fe80::/10=default"},
		{"empty and empty list", f("", "nonMasqueradeCIDRs: []"), Cilium, "no-cidrs 169.254.0.0/16=default fe80::/10=default"},
		{"upstream: a list in one of them", f("masqLinkLocal: true", "nonMasqueradeCIDRs: [10.0.0.0/8]"), Upstream,
			"list 10.0.0.0/8=file b fe80::/10=default"},
		{"upstream: the largest limit", f("nonMasqueradeCIDRs: [10.0.0.0/8, 11.0.0.0/8]\ncidrLimit: 1", "cidrLimit: 2"), Upstream,
			"list 10.0.0.0/8=file a 11.0.0.0/8=file a 169.254.0.0/16=default fe80::/10=default"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := Parse(c.fragments, c.profile)
			if err != nil {
				t.Fatal(err)
			}
			texts := []string{string(l.State)}
			for _, r := range l.Rules {
				texts = append(texts, r.Prefix.String()+"="+r.Origin)
			}
			if diff := cmp.Diff(c.want, strings.Join(texts, " ")); diff != "" {
				t.Error(diff)
			}
		})
	}
	if _, err := Parse(f("nonMasqueradeCIDRs: [10.0.0.0/8]", "nonMasqueradeCIDRs: [x]"), Cilium); err == nil || !strings.HasPrefix(err.Error(), "b: nonMasqueradeCIDRs[0]") {
		t.Errorf("one bad fragment: %v", err)
	}
	if _, err := Parse(nil, "gke"); err == nil {
		t.Error("unknown profile accepted")
	}
}

func TestLimits(t *testing.T) {
	big := func(n int) []byte {
		var b strings.Builder
		b.WriteString("nonMasqueradeCIDRs:\n")
		for i := range n {
			fmt.Fprintf(&b, "- 10.%d.%d.0/25\n", i>>8&255, i&255)
			if i >= 1<<16 {
				fmt.Fprintf(&b, "- 11.%d.%d.0/25\n", i>>8&255, i&255)
			}
		}
		return []byte(b.String())
	}
	l, err := Parse([]Fragment{{"f", big(policy.MaxPrefixes)}}, Cilium)
	if err != nil || len(l.Rules) != policy.MaxPrefixes+2 {
		t.Errorf("largest list: %d rules, %v", len(l.Rules), err)
	}
	if _, err := policy.Build(policy.Input{IPv4: true, NonMasq: l.Rules}); err != nil {
		t.Errorf("policy refuses the largest list: %v", err)
	}
	if _, err := Parse([]Fragment{{"f", big(policy.MaxPrefixes + 1)}}, Cilium); err == nil {
		t.Error("a list above the limit was accepted")
	}
	if _, err := Parse([]Fragment{{"f", make([]byte, MaxFileSize+1)}}, Cilium); err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("a file above the limit: %v", err)
	}
	l, err = Parse([]Fragment{{"f", []byte("nonMasqueradeCIDRs: [" + strings.Repeat("10.0.0.1/8,", 500) + "]")}}, Cilium)
	if err != nil || len(l.Warnings) != maxWarnings+1 {
		t.Errorf("%d warnings, %v", len(l.Warnings), err)
	}
}

func TestIgnoredKeysAreNamed(t *testing.T) {
	l, err := Parse([]Fragment{{"f", []byte("masqAll: 1\nresyncInterval: 5\ncidrLimit: 3\n")}}, Cilium)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"f: cidrLimit", "f: masqAll", "f: resyncInterval"}, l.Ignored); diff != "" {
		t.Error(diff)
	}
}

func TestDefaults(t *testing.T) {
	for _, p := range Profiles() {
		l, err := Parse(nil, p)
		if err != nil {
			t.Fatal(err)
		}
		d := Defaults(p)
		if d.State != Fallback {
			t.Errorf("state %s", d.State)
		}
		d.State = Missing
		if diff := cmp.Diff(l, d, cmp.Comparer(func(a, b policy.Rule) bool { return a == b })); diff != "" {
			t.Errorf("%s: a missing file is not the defaults:\n%s", p, diff)
		}
	}
}
