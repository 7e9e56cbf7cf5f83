package policytest

import (
	"strings"
	"testing"
)

func TestParseNamesTheLine(t *testing.T) {
	for text, want := range map[string]string{
		"tcp 10.0.0.1:1 > 1.1.1.1:2 syn -> pass-host":                   "t:1: neither base nor group",
		"base\n  tcp 10.0.0.1:1 > 1.1.1.1:2 syn -> pass-host":           "t:2: a case in no group",
		"group a\n  color red":                                          `t:2: unknown keyword "color"`,
		"group a\n  native 10.0.0.0":                                    "t:2: netip.ParsePrefix",
		"group a\n\n  tcp 10.0.0.1:1 > 1.1.1.1:2 urg -> pass-host":      `t:3: TCP flag "urg"`,
		"group a\n  tcp 10.0.0.1:1 > 1.1.1.1:2 -> pass-host":            "t:2: TCP flag",
		"group a\n  udp 10.0.0.1:1 > 1.1.1.1:2 syn -> pass-host":        "t:2: one word too many",
		"group a\n  tcp 10.0.0.1:1 > [fd00::1]:2 syn -> pass-host":      "t:2: 10.0.0.1 and fd00::1 are not of one family",
		"group a\n  icmp 10.0.0.1 > 1.1.1.1 echo -> pass-host":          `t:2: ICMP type "echo"`,
		"group a\n  esp 10.0.0.1 > 1.1.1.1 -> pass-host":                `t:2: protocol "esp"`,
		"group a\n  udp 10.0.0.1:1 > 1.1.1.1:2 on eth9 -> pass-host":    `t:2: device "eth9"`,
		"group a\n  udp 10.0.0.1:1 > 1.1.1.1:2 -> pass-hots":            `t:2: unknown outcome "pass-hots"`,
		"group a\n  udp 10.0.0.1:1 > 1.1.1.1:2 -> masq-new":             "t:2: masq-new: an address belongs",
		"group a\n  udp 10.0.0.1:1 > 1.1.1.1:2 -> pass-host 192.0.2.1":  "t:2: pass-host: an address belongs",
		"group a\n  route 10.0.0.0/8 via 192.0.2.1":                     "t:2: route",
		"group a\n  device eth0 192.0.2":                                "t:2: ParseAddr",
		"base\n  hosts none\n  ports 1\n  remote-nodes none\n  color x": "t:3: ",
	} {
		if _, err := Parse("t", text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got error %v, want %q", text, err, want)
		}
	}
}

// A block must not write into a list that another block has inherited.
func TestGroupsDoNotShareLists(t *testing.T) {
	groups, err := Parse("t", "base\n native 10.0.0.0/8\ngroup a\n native 11.0.0.0/8\n native 12.0.0.0/8\ngroup b\ngroup c\n native none\n")
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []int{2, 1, 0} {
		if got := len(groups[i].Input.Native); got != want {
			t.Errorf("group %s: %d entries, want %d", groups[i].Name, got, want)
		}
	}
}

func TestWithDevices(t *testing.T) {
	groups, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	cases := 0
	for _, g := range groups {
		cases += len(g.Cases)
		moved, err := g.WithDevices(map[string]int{"eth0": 70, "eth1": 80})
		if err != nil {
			t.Fatal(err)
		}
		for i, c := range moved.Cases {
			if want := map[int]int{2: 70, 3: 80}[g.Cases[i].Packet.Device]; c.Packet.Device != want {
				t.Errorf("cases.txt:%d: device %d, want %d", c.Line, c.Packet.Device, want)
			}
		}
		for i, d := range moved.Input.Devices {
			if want := map[int]int{2: 70, 3: 80}[g.Input.Devices[i].Index]; d.Index != want {
				t.Errorf("group %s: device %s: %d, want %d", g.Name, d.Name, d.Index, want)
			}
		}
	}
	t.Logf("%d groups, %d cases", len(groups), cases)
	if _, err := groups[0].WithDevices(nil); err == nil {
		t.Error("no index given: no error")
	}
}
