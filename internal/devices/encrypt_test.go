package devices

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestEncrypts(t *testing.T) {
	namespace(t)
	tunnel := []netlink.XfrmPolicyTmpl{{Src: ipNet("192.0.2.1/32").IP, Dst: ipNet("192.0.2.9/32").IP, Proto: netlink.XFRM_PROTO_ESP, Mode: netlink.XFRM_MODE_TUNNEL}}
	tunnel6 := []netlink.XfrmPolicyTmpl{{Src: ipNet("2001:db8::1/128").IP, Dst: ipNet("2001:db8::9/128").IP, Proto: netlink.XFRM_PROTO_ESP, Mode: netlink.XFRM_MODE_TUNNEL}}
	for _, p := range []netlink.XfrmPolicy{
		{Src: ipNet("10.0.1.0/24"), Dst: ipNet("10.9.0.0/16"), Dir: netlink.XFRM_DIR_OUT, Priority: 10, Tmpls: tunnel},
		{Src: ipNet("10.0.1.0/24"), Dst: ipNet("10.8.0.0/16"), Dir: netlink.XFRM_DIR_IN, Priority: 10, Tmpls: tunnel},
		// An exception to the first.
		{Src: ipNet("10.0.1.0/24"), Dst: ipNet("10.9.9.0/24"), Dir: netlink.XFRM_DIR_OUT, Priority: 1},
		{Src: ipNet("10.0.1.0/24"), Dst: ipNet("10.7.0.0/16"), Dir: netlink.XFRM_DIR_OUT, Priority: 10, Proto: 17, Tmpls: tunnel},
		{Src: ipNet("fd00:1::/64"), Dst: ipNet("fd00:9::/64"), Dir: netlink.XFRM_DIR_OUT, Priority: 10, Tmpls: tunnel6},
	} {
		must(t, netlink.XfrmPolicyAdd(&p))
	}
	for _, c := range []struct {
		src, dst string
		want     bool
	}{
		{"10.0.1.2", "10.9.1.1", true},
		{"10.0.2.2", "10.9.1.1", false},
		{"10.0.1.2", "10.9.9.1", false},
		{"10.0.1.2", "10.8.1.1", false},
		{"10.0.1.2", "10.7.1.1", false},
		{"fd00:1::2", "fd00:9::1", true},
		{"fd00:1::2", "fd00:8::1", false},
	} {
		got, err := Encrypts(netip.MustParseAddr(c.src), netip.MustParseAddr(c.dst), 6)
		if err != nil || got != c.want {
			t.Errorf("%s to %s: %v, %v, want %v", c.src, c.dst, got, err, c.want)
		}
	}
	if got, err := Encrypts(netip.MustParseAddr("10.0.1.2"), netip.MustParseAddr("10.7.1.1"), 17); err != nil || !got {
		t.Errorf("of the policy's protocol: %v, %v", got, err)
	}
}
