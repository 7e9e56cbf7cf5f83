package datapath

import (
	"testing"
)

// TestProgram runs the programs packet by packet, with all that the kernel has and
// with nothing that 5.10 does not have.
func TestProgram(t *testing.T) {
	t.Parallel()
	for _, tier := range []struct {
		name    string
		without []Feature
	}{{"all", nil}, {"lowest", AllFeatures()}} {
		t.Run(tier.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, tier.without...)
			runPrograms(t, r)
			if tier.without == nil {
				// These ask the policy's tables, which are the same everywhere.
				t.Run("Table", func(t *testing.T) { testTable(t, r.on(t)) })
				t.Run("AgreesWithDecide", func(t *testing.T) { testAgreesWithDecide(t, r.on(t)) })
			}
		})
	}
}

// runPrograms lets the tests share one data plane, because the verifier takes longer
// than most of them; each begins without flows.
func runPrograms(t *testing.T, r *rig) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, *rig)
	}{
		{"WithoutPolicy", testWithoutPolicy},
		{"TranslationIsReversible", testTranslationIsReversible},
		{"ChecksumZero", testChecksumZero},
		{"Truncated", testTruncated},
		{"TruncatedErrors", testTruncatedErrors},
		{"Errors", testErrors},
		{"Redirects", testRedirects},
		{"ErrorsWithBadQuote", testErrorsWithBadQuote},
		{"ErrorsDoNotRefresh", testErrorsDoNotRefresh},
		{"ErrorsWithBadChecksum", testErrorsWithBadChecksum},
		{"ErrorExtensions", testErrorExtensions},
		{"OthersDoNotRefresh", testOthersDoNotRefresh},
		{"ErrorsOfOthers", testErrorsOfOthers},
		{"ErrorFragments", testErrorFragments},
		{"ErrorFragmentsShort", testErrorFragmentsShort},
		{"ErrorQuotesFragment", testErrorQuotesFragment},
		{"Fragments", testFragments},
		{"FragmentsAlone", testFragmentsAlone},
		{"FragmentNoteExpires", testFragmentNoteExpires},
		{"FragmentsThatPass", testFragmentsThatPass},
		{"FragmentsOverlap", testFragmentsOverlap},
		{"Hold", testHold},
		{"HoldForNode", testHoldForNode},
		{"HoldNothing", testHoldNothing},
		{"HoldBounds", testHoldBounds},
		{"HoldExpires", testHoldExpires},
		{"Inbound", testInbound},
		{"InboundLatePacket", testInboundLatePacket},
		{"InboundLearning", testInboundLearning},
		{"InboundNotByAnswers", testInboundNotByAnswers},
		{"InboundExpiry", testInboundExpiry},
		{"InboundExpiredArrives", testInboundExpiredArrives},
		{"Stray", testStray},
		{"EndpointIndependent", testEndpointIndependent},
		{"SimultaneousOpen", testSimultaneousOpen},
		{"OutOfWindow", testOutOfWindow},
		{"ResetStorm", testResetStorm},
		{"NodeResets", testNodeResets},
		{"ClosedPort", testClosedPort},
		{"PingIdentifierZero", testPingIdentifierZero},
		{"Host", testHost},
		{"HostCollision", testHostCollision},
		{"HostClaims", testHostClaims},
		{"HostSockets", testHostSockets},
		{"HostICMP", testHostICMP},
		{"UnknownProtocols", testUnknownProtocols},
		{"Tags", testTags},
		{"AcceleratedTags", testAcceleratedTags},
		{"Extensions", testExtensions},
		{"CompleteKinds", testCompleteKinds},
		{"HostClaimsPorts", testHostClaimsPorts},
		{"SCTPLengths", testSCTPLengths},
		{"SCTPOffloaded", testSCTPOffloaded},
		{"SCTPPorts", testSCTPPorts},
		{"SCTPChunks", testSCTPChunks},
		{"SCTPFragments", testSCTPFragments},
		{"SCTPShort", testSCTPShort},
		{"NetfilterFirst", testNetfilterFirst},
		{"NetfilterSecond", testNetfilterSecond},
		{"NetfilterElsewhere", testNetfilterElsewhere},
		{"Handover", testHandover},
		{"HandoverSides", testHandoverSides},
		{"HandoverKeepsPorts", testHandoverKeepsPorts},
		{"Import", testImport},
		{"ImportOverHost", testImportOverHost},
		{"ImportRefuses", testImportRefuses},
		{"ImportDead", testImportDead},
		{"Tunnels", testTunnels},
		{"TunnelTakesOver", testTunnelTakesOver},
		{"TunnelPorts", testTunnelPorts},
		{"TunnelList", testTunnelList},
		{"SentinelSees", testSentinelSees},
		{"SentinelExcuses", testSentinelExcuses},
		{"SentinelRouteSource", testSentinelRouteSource},
		{"SentinelPolicyChange", testSentinelPolicyChange},
		{"Heals", testHeals},
		{"LostPort", testLostPort},
		{"SamePortEverywhere", testSamePortEverywhere},
		{"KnownFlowOutlivesPolicy", testKnownFlowOutlivesPolicy},
		{"PolicyVoidsAnswers", testPolicyVoidsAnswers},
		{"Reopens", testReopens},
		{"StackedDevices", testStackedDevices},
		{"AnswersToInside", testAnswersToInside},
		{"CountsSegments", testCountsSegments},
		{"QuotaHardLimit", testQuotaHardLimit},
		{"QuotaRate", testQuotaRate},
		{"QuotaRefusalRemembered", testQuotaRefusalRemembered},
		{"PortClass", testPortClass},
		{"RefusalIsTold", testRefusalIsTold},
		{"RefusalIsNotTold", testRefusalIsNotTold},
		{"ExplainTable", testExplainTable},
		{"ExplainChangesNothing", testExplainChangesNothing},
		{"ExplainPort", testExplainPort},
		{"ExplainRefusals", testExplainRefusals},
		{"ExplainFull", testExplainFull},
		{"ExplainInbound", testExplainInbound},
		{"ExplainMatch", testExplainMatch},
		{"ExplainLayout", testExplainLayout},
		{"ExplainBesideTraffic", testExplainBesideTraffic},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, r.on(t)) })
	}
}
