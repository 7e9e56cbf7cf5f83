package lab_test

import (
	"bytes"
	"net"
	"testing"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// What neighbors have learned stays true: a bridge has its own address whatever the
// addresses of its ports, and an end of a link the one that it was given.
func TestLinkLayerAddressesStay(t *testing.T) {
	t.Parallel()
	fabric, host := labtest.NewNS(t), labtest.NewNS(t)
	if err := fabric.AddBridge("br0"); err != nil {
		t.Fatal(err)
	}
	before, err := fabric.MAC("br0")
	if err != nil {
		t.Fatal(err)
	}
	lowest, card := net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2}
	for name, o := range map[string]struct {
		a, b *lab.NS
		mac  net.HardwareAddr
	}{"p0": {host, fabric, lowest}, "eth0": {fabric, host, card}} {
		if err := lab.Link(o.a, "peer-"+name, o.b, name, lab.LinkOpts{MACB: o.mac}); err != nil {
			t.Fatal(err)
		}
		if got, err := o.b.MAC(name); err != nil || !bytes.Equal(got, o.mac) {
			t.Errorf("%s has %s, want %s (%v)", name, got, o.mac, err)
		}
	}
	if err := fabric.AddPort("br0", "p0"); err != nil {
		t.Fatal(err)
	}
	if after, err := fabric.MAC("br0"); err != nil || !bytes.Equal(after, before) {
		t.Errorf("with a port of the lowest address the bridge has %s, it had %s (%v)", after, before, err)
	}
}
