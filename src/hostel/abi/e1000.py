"""The Intel 82540EM: registers, bits, descriptors.

From Intel's "PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual" (8254x SDM),
chapter 13 for the registers, §3.2.3 and §3.3 for the descriptors; named as there.
"""

from __future__ import annotations

from .record import Record

VENDOR, DEVICE = 0x8086, 0x100E

# --- Registers (table 13-2) --------------------------------------------------------------------

CTRL = 0x0000
STATUS = 0x0008
EECD = 0x0010
EERD = 0x0014
CTRL_EXT = 0x0018
MDIC = 0x0020
FCAL = 0x0028
FCAH = 0x002C
FCT = 0x0030
VET = 0x0038
ICR = 0x00C0
ITR = 0x00C4
ICS = 0x00C8
IMS = 0x00D0
IMC = 0x00D8
RCTL = 0x0100
FCTTV = 0x0170
TXCW = 0x0178
TCTL = 0x0400
TIPG = 0x0410
AIFS = 0x0458
LEDCTL = 0x0E00
PBA = 0x1000
FCRTL = 0x2160
FCRTH = 0x2168
RDBAL, RDBAH, RDLEN, RDH, RDT = 0x2800, 0x2804, 0x2808, 0x2810, 0x2818
RDTR = 0x2820
RXDCTL = 0x2828
RADV = 0x282C
RSRPD = 0x2C00
TDBAL, TDBAH, TDLEN, TDH, TDT = 0x3800, 0x3804, 0x3808, 0x3810, 0x3818
TIDV = 0x3820
TXDCTL = 0x3828
TADV = 0x382C
TSPMT = 0x3830
RXCSUM = 0x5000
MTA, MTA_SIZE = 0x5200, 128
RAL, RAH, RA_COUNT = 0x5400, 0x5404, 16
VFTA, VFTA_SIZE = 0x5600, 128
WUC = 0x5800
WUFC = 0x5808
MANC = 0x5820

REGISTERS_SIZE = 0x2_0000
IO_SIZE = 0x40
IOADDR, IODATA = 0, 4

# Statistics (§13.7): they count up, and reading one clears it.
STATISTICS, STATISTICS_END = 0x4000, 0x4100
MPC = 0x4010
PRC64, PRC127, PRC255, PRC511, PRC1023, PRC1522 = range(0x405C, 0x4074, 4)
GPRC, BPRC, MPRC, GPTC = range(0x4074, 0x4084, 4)
GORCL, GORCH, GOTCL, GOTCH = range(0x4088, 0x4098, 4)
ROC = 0x40AC
TORL, TORH, TOTL, TOTH, TPR, TPT = range(0x40C0, 0x40D8, 4)
PTC64, PTC127, PTC255, PTC511, PTC1023, PTC1522 = range(0x40D8, 0x40F0, 4)
MPTC, BPTC, TSCTC = range(0x40F0, 0x40FC, 4)

# --- Bits --------------------------------------------------------------------------------------

CTRL_FD = 1 << 0
CTRL_SLU = 1 << 6
CTRL_SPEED_1000 = 2 << 8
CTRL_RST = 1 << 26
CTRL_VME = 1 << 30
CTRL_PHY_RST = 1 << 31

STATUS_FD = 1 << 0
STATUS_LU = 1 << 1
STATUS_SPEED_1000 = 2 << 6

EECD_SK = 1 << 0
EECD_CS = 1 << 1
EECD_DI = 1 << 2
EECD_DO = 1 << 3
EECD_FWE_DISABLED = 1 << 4
EECD_REQ = 1 << 6
EECD_GNT = 1 << 7
EECD_PRES = 1 << 8
EERD_START = 1 << 0
EERD_DONE = 1 << 4

MDIC_WRITE, MDIC_READ = 1, 2
MDIC_READY = 1 << 28
MDIC_INTERRUPT = 1 << 29
MDIC_ERROR = 1 << 30

INT_TXDW = 1 << 0
INT_TXQE = 1 << 1
INT_LSC = 1 << 2
INT_RXDMT0 = 1 << 4
INT_RXO = 1 << 6
INT_RXT0 = 1 << 7
INT_MDAC = 1 << 9
INT_ALL = 0x1_FFFF

RCTL_EN = 1 << 1
RCTL_SBP = 1 << 2
RCTL_UPE = 1 << 3
RCTL_MPE = 1 << 4
RCTL_LPE = 1 << 5
RCTL_RDMTS_SHIFT = 8
RCTL_MO_SHIFT = 12
RCTL_BAM = 1 << 15
RCTL_BSIZE_SHIFT = 16
RCTL_VFE = 1 << 18
RCTL_BSEX = 1 << 25
RCTL_SECRC = 1 << 26

TCTL_EN = 1 << 1
TCTL_PSP = 1 << 3

RAH_AV = 1 << 31

# --- The PHY, a Marvell 88E1011 (§8, IEEE 802.3 clause 22) ---------------------------------------

PHY_ADDRESS = 1
PHY_CTRL, PHY_STATUS, PHY_ID1, PHY_ID2, PHY_ADV, PHY_LP_ABILITY, PHY_EXPANSION = range(7)
PHY_1000T_CTRL, PHY_1000T_STATUS = 9, 10
PHY_EXT_STATUS = 15
PHY_SPEC_CTRL, PHY_SPEC_STATUS = 16, 17
PHY_EXT_SPEC_CTRL = 20

PHY_CTRL_RESET = 1 << 15
PHY_CTRL_AUTONEG = 1 << 12
PHY_CTRL_POWER_DOWN = 1 << 11
PHY_CTRL_RESTART = 1 << 9
PHY_CTRL_FULL_DUPLEX = 1 << 8
PHY_CTRL_SPEED_1000 = 1 << 6
PHY_STATUS_AUTONEG_DONE = 1 << 5
PHY_STATUS_LINK = 1 << 2

# --- Descriptors, 16 bytes each ------------------------------------------------------------------

RX_DESC = Record("rx_desc", addr="Q", length="H", checksum="H", status="B", errors="B", special="H")
RX_DD, RX_EOP, RX_IXSM, RX_VP, RX_TCPCS = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5

TX_DESC = Record("tx_desc", addr="Q", lower="I", status="B", options="B", special="H")
"""Legacy: ``lower`` is length, CSO, command; ``options`` is CSS. Data: length of 20 bits, type, command;
``options`` is POPTS."""
TX_CONTEXT = Record(
    "tx_context",
    ipcss="B",
    ipcso="B",
    ipcse="H",
    tucss="B",
    tucso="B",
    tucse="H",
    lower="I",
    status="B",
    hdrlen="B",
    mss="H",
)
DESC_SIZE = 16
TX_STATUS_OFFSET = 12
TX_DD = 1 << 0

TX_CMD_EOP = 1 << 24
TX_CMD_IC = 1 << 26
TX_CMD_TSE = 1 << 26
TX_CMD_RS = 1 << 27
TX_CMD_DEXT = 1 << 29
TX_CMD_VLE = 1 << 30
TX_DTYP_DATA = 1 << 20
TX_DTYP_MASK = 0xF << 20
TX_LENGTH_MASK = 0xF_FFFF
TX_LEGACY_LENGTH_MASK = 0xFFFF
TX_CONTEXT_TCP = 1 << 24
TX_CONTEXT_IPV4 = 1 << 25
TX_POPTS_IXSM, TX_POPTS_TXSM = 1 << 0, 1 << 1

EEPROM_SUM = 0xBABA
EEPROM_WORDS = 64
