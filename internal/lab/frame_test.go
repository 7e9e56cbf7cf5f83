package lab

import (
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"
)

const (
	ether4 = "02000000000202000000000108 00"
	ether6 = "02000000000202000000000186dd"
	syn4   = "4500002c000000004006 0000 0a000102 c0000202" + "1092 0050 00000001 00000000 6002 ffff 0000 0000 020405b4"
	first4 = "4500001c00012000 4011 0000 0a000102 c0000202 0001000200100000"
	later4 = "4500001c00010001 4011 0000 0a000102 c0000202 0001000200100000"
	v6head = "60000000 %s fd000001000000000000000000000002 20010db8000200000000000000000002"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func v6(lengthNextHop, rest string) string {
	return strings.Replace(v6head, "%s", lengthNextHop, 1) + rest
}

func TestParseFrame(t *testing.T) {
	for _, c := range []struct{ name, packet, want string }{
		{"tcp", ether4 + syn4, "10.0.1.2 > 192.0.2.2 proto 6 ttl 64 ports 4242 > 80 flags 0x02"},
		{"padding", ether4 + syn4 + "0000", "10.0.1.2 > 192.0.2.2 proto 6 ttl 64 ports 4242 > 80 flags 0x02"},
		{"first fragment", ether4 + first4, "10.0.1.2 > 192.0.2.2 proto 17 ttl 64 ports 1 > 2 fragment"},
		{"later fragment", ether4 + later4, "10.0.1.2 > 192.0.2.2 proto 17 ttl 64 fragment"},
		{"udp6", ether6 + v6("0008 11 40", "0001000200080000"), "fd00:1::2 > 2001:db8:2::2 proto 17 ttl 64 ports 1 > 2"},
		{"udp6 behind options", ether6 + v6("0018 00 3f", "3c00010400000000 1100010400000000 0001000200080000"),
			"fd00:1::2 > 2001:db8:2::2 proto 17 ttl 63 ports 1 > 2"},
		{"first fragment6", ether6 + v6("0010 2c 40", "1100000100000001 0001000200080000"),
			"fd00:1::2 > 2001:db8:2::2 proto 17 ttl 64 ports 1 > 2 fragment"},
		{"later fragment6", ether6 + v6("0010 2c 40", "1100000900000001 0001000200080000"),
			"fd00:1::2 > 2001:db8:2::2 proto 17 ttl 64 fragment"},
		{"echo6", ether6 + v6("0008 3a 40", "8000000000010002"), "fd00:1::2 > 2001:db8:2::2 proto 58 ttl 64 icmp type 128 code 0"},
	} {
		b := unhex(t, c.packet)
		f, ok := ParseFrame(b)
		if !ok || f.String() != c.want {
			t.Errorf("%s: %q %t, want %q", c.name, f, ok, c.want)
		}
		for n := range b {
			ParseFrame(b[:n]) // must not panic
		}
		if !SourceIn(PodRange4, PodRange6)(Packet{Data: b}) {
			t.Errorf("%s: source not in the pod ranges", c.name)
		}
		if SourceIn(netip.MustParsePrefix("10.0.2.0/24"))(Packet{Data: b}) {
			t.Errorf("%s: source in a range of others", c.name)
		}
	}
	if _, ok := ParseFrame(unhex(t, "0200000000020200000000010806"+"0001")); ok {
		t.Error("ARP was parsed as IP")
	}
}

func FuzzParseIP(f *testing.F) {
	for _, s := range []string{syn4, first4, later4, v6("0018 00 3f", "3c00010400000000 1100010400000000 0001000200080000")} {
		f.Add(unhex(f, s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, _ := ParseIP(b)
		_ = p.String()
	})
}
